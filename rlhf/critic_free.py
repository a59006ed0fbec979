"""What reinforcement learning without a critic shares: K replies to a prompt, each one's baseline made of the others.

GRPO and RLOO differ in their objectives and in nothing here.
"""

from dataclasses import dataclass, fields
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from rlhf.data.data import Split
from rlhf.data.records import Prompt
from rlhf.errors import UserError
from rlhf.functional.groups import grouped, has_spread
from rlhf.functional.scores import missing_end
from rlhf.models.language_model import LanguageModel
from rlhf.objective import GroupObjective, Metrics
from rlhf.policy_gradient import RolloutStage
from rlhf.refill import others_in_order, refill
from rlhf.rollout import Rollout, Sampler
from rlhf.scoring import Reward
from rlhf.stage import Optimizer, Schedule, chunks


@dataclass(frozen=True)
class Replies:
    """What an update of a group stage reads of a rollout. Rows are prompt + reply; the last R columns are the reply."""

    ids: Tensor  # [B, P+R]
    attention_mask: Tensor  # [B, P+R]
    position_ids: Tensor  # [B, P+R]
    loss_mask: Tensor  # [B, P+R], 1 on the policy's own tokens
    mask: Tensor  # [B, R], the same of the reply alone
    logp: Tensor  # [B, R], of the policy that sampled
    ref_logp: Tensor  # [B, R]
    advantages: Tensor  # [B]
    keep: Tensor  # [B] bool, whether the loss counts the reply

    @classmethod
    def of(cls, rollout: Rollout, logp: Tensor, ref_logp: Tensor, advantages: Tensor, keep: Tensor) -> "Replies":
        """A rollout with what was worked out about it."""
        inputs = (rollout.ids, rollout.attention_mask, rollout.position_ids, rollout.loss_mask, rollout.mask)
        return cls(*inputs, logp, ref_logp, advantages, keep)

    def __getitem__(self, rows: Tensor | slice) -> "Replies":
        return Replies(*(getattr(self, field.name)[rows] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.ids)

    def counted(self) -> "Replies":
        """Without the rows that do not count; one row stays in any case, so that there is something to read."""
        keep = self.keep.nonzero()[:, 0]
        return self[keep if len(keep) else slice(0, 1)]


class GroupStage(RolloutStage):
    """Base class of the stages whose baseline is the other replies to the same prompt.

    Args:
        steps: Rollouts, each of ``rollout.samples`` replies to ``batch_size`` prompts.
        batch_size, epochs, minibatches, score_clip: As ``RolloutStage``.
        knobs: The others of ``RolloutStage``.
        refills: Most times per rollout that further prompts are sampled in place of groups whose replies all score the
            same (DAPO's dynamic sampling), 0: such groups stay.
    """

    def __init__(
        self,
        model: LanguageModel,
        objective: GroupObjective,
        data: Split,
        text: Split | None,
        reward: Reward,
        rollout: Sampler,
        optimizer: Optimizer,
        scheduler: Schedule,
        *,
        steps: Annotated[int, Field(gt=0)] = 40,
        batch_size: Annotated[int, Field(gt=0)] = 32,
        epochs: Annotated[int, Field(gt=0)] = 1,
        minibatches: Annotated[int, Field(gt=0)] = 1,
        score_clip: Annotated[float, Field(gt=0)] | None = None,
        refills: Annotated[int, Field(ge=0)] = 0,
        **knobs: Any,
    ) -> None:
        super().__init__(
            model,
            objective,
            data,
            text,
            reward,
            rollout,
            optimizer,
            scheduler,
            steps=steps,
            batch_size=batch_size,
            epochs=epochs,
            minibatches=minibatches,
            score_clip=score_clip,
            **knobs,
        )
        self.refills = refills
        self.first_draw: Metrics = {}

    @classmethod
    def check_parts(cls, *, rollout: Sampler | None = None, **parts: Any) -> None:
        """As ``Stage.check_parts``."""
        super().check_parts(**parts)
        if rollout is not None and rollout.samples < 2:
            raise UserError(
                f"rollout.samples={rollout.samples}: the baseline of a reply is the other replies to its prompt; "
                "type rollout.samples=8"
            )
        if rollout is not None and not rollout.exact:
            raise UserError(
                "replies must come from the policy's own distribution: "
                "type rollout.top_k=0 rollout.top_p=1 and rollout.temperature above 0"
            )

    @torch.no_grad()
    def refilled(self, rollout: Rollout) -> Rollout:
        """With ``refills``, a rollout whose groups have something to teach, as far as prompts are found whose have."""
        if not self.refills:
            return rollout

        def scores(sampled: Rollout) -> Tensor:
            raw = self.reward(sampled).float()
            if self.normalize_scores == "none":
                return self.learnt(raw, sampled.ended)
            # Normalisation makes equal scores of equal ones, and its moments are to be those of the final rollout.
            return missing_end(raw, sampled.ended, self.missing_end_penalty, self.missing_end)

        def sample(prompts: list[Prompt], index: int) -> Rollout:
            return self.rollout.sample(self.policy, prompts, seed=self.step_seed(f"refill {index}"))

        samples = self.rollout.samples
        others = others_in_order(self.examples, rollout.prompts, self.step_seed("further prompts"))
        final, asked = refill(rollout, scores, sample, others, samples, self.refills, self.policy.pad_id)
        self.first_draw = {
            "drawn_score": self.reward(rollout).float().mean(),
            "drawn_zero_spread": 1.0 - has_spread(scores(rollout), samples).float().mean(),
            "refilled": torch.tensor(asked * samples / len(rollout.texts), device=rollout.mask.device),
        }
        return final

    @torch.no_grad()
    def log_probabilities(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Of the replies' tokens under the policy that sampled and under the reference, [B, R] each."""
        inputs = (rollout.ids, rollout.attention_mask, rollout.position_ids, rollout.loss_mask)
        width, temperature = rollout.mask.shape[1], self.rollout.temperature
        logp, ref_logp = [], []
        for part in chunks(len(rollout.ids), self.micro_batch_size or -(-len(rollout.ids) // self.minibatches)):
            x = [values[part] for values in inputs]
            logp.append(self.policy.logprobs(x[0], x[1], x[2], x[3], temperature)[0][:, -width:])
            ref_logp.append(self.reference.logprobs(x[0], x[1], x[2], x[3], temperature)[:, -width:])
        self.check_sampler(rollout, torch.cat(logp))
        return torch.cat(logp), torch.cat(ref_logp)

    def update(self, minibatch: Replies, first: bool) -> Metrics:
        """One optimizer step on the objective + gamma * L_pretraining."""
        x = minibatch.counted()
        kept = x.keep.unsqueeze(1)
        weights, divisor = self.objective.weights(x.mask, self.rollout.longest)
        weights, total = weights * kept, self.total((divisor * x.keep).sum())
        counted = self.total((x.mask & kept).sum())
        for part in chunks(len(x), self.micro_batch_size):
            y, width = x[part], x.mask.shape[1]
            logp, entropy = self.policy.logprobs(
                y.ids, y.attention_mask, y.position_ids, y.loss_mask, self.rollout.temperature, entropy=True
            )
            assert entropy is not None
            logp, entropy = logp[:, -width:], entropy[:, -width:]
            if first:
                self.check_ratio((logp.detach() - y.logp).exp(), y.mask)
            losses, metrics = self.objective(logp, y.logp, y.ref_logp, y.advantages, y.mask, entropy)
            self.backward_mean(losses, weights[part], total)
            self.gather_means(metrics, y.mask & kept[part], counted)  # over tokens, whatever the loss is divided by
            self.count(len(y), y.attention_mask.sum())
        if self.objective.gamma:
            self.pretraining_term(len(minibatch))
        # Where nothing counted there is no gradient, and momentum alone must not move the policy.
        idle = bool(counted < 0.5) and not self.objective.gamma
        return self.step(frozen=self.policy if idle else None)

    def report(
        self, rollout: Rollout, raw: Tensor, scores: Tensor, experience: Replies, metrics: list[Metrics]
    ) -> None:
        """One row per rollout: means over its updates, what the replies are like, and what groups had to teach."""
        samples = self.rollout.samples
        self.record(
            {
                **self.of_updates(metrics),
                **self.describe(rollout, raw, experience.logp, experience.ref_logp),
                **self.first_draw,
            },
            group_std=grouped(scores, samples).std(1).mean(),
            zero_spread=1.0 - has_spread(scores, samples).float().mean(),
            dropped=1.0 - experience.keep.float().mean(),
        )
