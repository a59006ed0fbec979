"""What reinforcement learning stages share: rollouts, scores, the gamma term, checks and diagnostics.

A stage on top of ``RolloutStage`` says how advantages come from scores and what loss they go into; everything that
must be the same in PPO, GRPO and RLOO for a comparison to mean something is here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Any, Protocol, Self, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from rlhf.data.collate import TokenBatch, collate, pack
from rlhf.data.data import Split
from rlhf.data.records import Prompt
from rlhf.data.template import encode_text
from rlhf.errors import RunFailed, UserError
from rlhf.functional.advantages import sequence_kl
from rlhf.functional.groups import grouped, has_spread
from rlhf.functional.kl import k3
from rlhf.functional.reduction import weighted_mean
from rlhf.models.language_model import LanguageModel
from rlhf.objective import GroupObjective, Metrics
from rlhf.rollout import Rollout, Sampler, single
from rlhf.scoring import Reward
from rlhf.stage import Optimizer, Parts, Schedule, Stage, check_context, chunks


class SampledObjective(Protocol):
    """What every objective over sampled replies has."""

    @property
    def beta(self) -> float:
        """KL coefficient, at the start where it adapts."""

    @property
    def gamma(self) -> float:
        """Weight of the pretraining loss in the same optimizer step; 0 reads no text."""


class RowsOfTensors(Protocol):
    """Experience: rows that can be counted and picked."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor | slice) -> Self: ...


E = TypeVar("E", bound=RowsOfTensors)


class RolloutStage(Stage):
    """Base class of the stages that sample from the policy, score the replies, and update on them.

    Args:
        steps: Rollouts, each of ``batch_size`` prompts.
        batch_size: Prompts per rollout.
        epochs: Passes over each rollout.
        minibatches: Updates per pass.
        micro_batch_size: Rows per forward pass, null: a whole minibatch.
        gradient_clip: Largest gradient norm, null: none.
        text_ratio: Rows of pretraining text per reply in the gamma term.
        text_length: Tokens in a row of pretraining text.
        missing_end_penalty: Taken from the score of a reply that did not end by itself.
        score_clip: Scores are clipped to plus or minus this, null: not.
        tolerance: Largest difference between the sampler's log-probabilities and recomputed ones in fp32.
    """

    telling = ("score", "kl", "length", "loss")
    headline = "val/score"

    def __init__(
        self,
        model: LanguageModel,
        objective: SampledObjective,
        data: Split,
        text: Split | None,
        reward: Reward,
        rollout: Sampler,
        optimizer: Optimizer,
        scheduler: Schedule,
        *,
        steps: int,
        batch_size: int,
        epochs: int,
        minibatches: int,
        micro_batch_size: int | None,
        gradient_clip: float | None,
        text_ratio: float,
        text_length: int,
        missing_end_penalty: float,
        score_clip: float | None,
        tolerance: float,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            scheduler,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            gradient_clip=gradient_clip,
        )
        if batch_size % minibatches:
            raise UserError(
                f"stage.batch_size={batch_size} is not a multiple of stage.minibatches={minibatches}: "
                f"type stage.batch_size={-(-batch_size // minibatches) * minibatches}"
            )
        check_context(model, text_length, "stage.text_length")
        self.objective: Any = objective
        self.data, self.text, self.reward, self.rollout = data, text, reward, rollout
        self.steps, self.epochs, self.minibatches = steps, epochs, minibatches
        self.text_ratio, self.text_length = text_ratio, text_length
        self.missing_end_penalty, self.score_clip, self.tolerance = missing_end_penalty, score_clip, tolerance
        self.policy.disable_dropout()
        self.reference = model.reference()
        self.beta = objective.beta

    # -- set-up ---------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Prompts, the stream of pretraining text, and the frozen models on the device."""
        self.reference.to(self.device)
        if hasattr(self.reward, "to"):
            self.reward.to(self.device)
        self.examples, self.held_out = self.data.train, self.data.validation
        if hasattr(self.reward, "check"):  # a reward that cannot score these prompts says so before anything is sampled
            self.reward.check([*self.examples, *self.held_out])
        self.batches = self.order(len(self.examples), steps=self.steps)
        if self.objective.gamma:
            if self.text is None:
                raise UserError("objective.gamma > 0 needs pretraining text: type text=text, or objective.gamma=0")
            tokenizer = self.policy.tokenizer
            self.documents = pack([encode_text(tokenizer, record.text) for record in self.text.train], self.text_length)

    def parts(self, examples: list[Prompt]) -> Parts[Prompt]:
        """Prompts stay records, which the sampler tokenises; micro-batches are cut from the minibatches."""
        return Parts(examples)

    @property
    def total_updates(self) -> int:
        """Minibatches of all rollouts."""
        return self.steps * self.epochs * self.minibatches

    # -- scores and updates -----------------------------------------------------------------------------------------

    def scores(self, rollout: Rollout) -> Tensor:
        """What the reward says of each reply, [B], less the penalty for not ending."""
        scores = self.reward(rollout).float()
        if self.score_clip is not None:
            scores = scores.clamp(-self.score_clip, self.score_clip)
        return scores - self.missing_end_penalty * (~rollout.ended).float()

    def order_of_updates(self, experience: E) -> Iterator[tuple[bool, E]]:
        """Minibatches, every epoch in an order of its own; the flag marks the first, where the ratio must be 1."""
        for epoch in range(self.epochs):
            generator = torch.Generator().manual_seed(self.step_seed(f"epoch {epoch}"))
            order = torch.randperm(len(experience), generator=generator).to(self.device)
            for index, rows in enumerate(order.chunk(self.minibatches)):
                yield epoch == index == 0, experience[rows]

    def pretraining_term(self, replies: int) -> None:
        """Adds gamma * cross-entropy on pretraining text to the gradient of this update."""
        generator = torch.Generator().manual_seed(self.step_seed(f"text {self.updates_done}"))
        picked = torch.randint(len(self.documents), (max(1, round(self.text_ratio * replies)),), generator=generator)
        parts: list[TokenBatch] = [
            collate([self.documents[i] for i in picked[part].tolist()], self.policy.pad_id).to(self.device)
            for part in chunks(len(picked), self.micro_batch_size)
        ]
        total = self.total(torch.stack([part.loss_mask.sum() for part in parts]).sum())
        for part in parts:
            logp, _ = self.policy.logprobs(part.ids, part.attention_mask, part.position_ids, part.loss_mask)
            self.backward_mean(-logp, part.loss_mask, total, {"pretraining_loss": -logp}, scale=self.objective.gamma)

    # -- checks ---------------------------------------------------------------------------------------------------

    @property
    def exact(self) -> bool:
        """Whether arithmetic is fp32, where two ways to the same number may be held against each other."""
        return self.trainer.precision in ("32-true", "64-true")

    def check_sampler(self, rollout: Rollout, logp: Tensor) -> None:
        """The sampler must have drawn from the distribution that is scored, or KL and ratio mean nothing."""
        gap = ((rollout.logp - logp).abs() * rollout.mask).max()
        if self.exact and gap > self.tolerance:
            raise RunFailed(
                f"the sampler's log-probabilities differ from the policy's by {gap:.2g} nats "
                f"(stage.tolerance={self.tolerance}): the replies were not drawn from the distribution that is scored"
            )

    def check_ratio(self, ratio: Tensor, mask: Tensor) -> None:
        """Before the first update of a rollout the policy is the one that sampled: ratio 1, KL 0."""
        gap = ((ratio - 1).abs() * mask).max()
        if self.exact and gap > 1e-4:
            raise RunFailed(
                f"ratio differs from 1 by {gap:.2g} at the first minibatch of a rollout: dropout or padding?"
            )

    # -- what is logged -------------------------------------------------------------------------------------------

    def describe(self, rollout: Rollout, scores: Tensor, logp: Tensor, ref_logp: Tensor) -> Metrics:
        """Score, KL (nats per reply) and the signs of reward hacking."""
        kl = sequence_kl(logp, ref_logp, rollout.mask)
        return {
            "score": scores.mean(),
            "score_std": scores.std(),
            "kl": kl.mean(),
            "kl_k3": (k3(logp, ref_logp) * rollout.mask).sum(1).mean(),
            "rlhf_reward": (scores - self.beta * kl).mean(),
            **rollout.diagnostics(),
        }

    @torch.no_grad()
    def validation_step(self, batch: Parts[Prompt], batch_idx: int) -> None:
        """Score and KL on held-out prompts."""
        rollout = self.rollout.sample(self.policy, list(batch), seed=self.step_seed("validation", batch_idx))
        inputs = (rollout.ids, rollout.attention_mask, rollout.position_ids, rollout.loss_mask)
        width = rollout.mask.shape[1]
        logp = self.policy.logprobs(*inputs, self.rollout.temperature)[0][:, -width:]
        ref_logp = self.reference.logprobs(*inputs, self.rollout.temperature)[:, -width:]
        metrics = self.describe(rollout, self.scores(rollout), logp, ref_logp)
        self.log_dict(
            {f"val/{name}": value for name, value in metrics.items()},
            batch_size=len(batch),
            on_step=False,
            on_epoch=True,
            sync_dist=self.trainer.world_size > 1,
        )

    def prompts_to_show(self) -> list[Prompt]:
        """Held-out prompts."""
        return list(self.held_out)

    def write_samples(self, count: int = 8, sampler: Sampler | None = None) -> None:
        """Replies to read, sampled as in training, one to a prompt."""
        super().write_samples(count, sampler or single(self.rollout))


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
        """Without the rows that do not count; one row stays in any case, so that every process has a gradient."""
        keep = self.keep.nonzero()[:, 0]
        return self[keep if len(keep) else slice(0, 1)]


class GroupStage(RolloutStage):
    """Base class of the stages whose baseline is the other replies to the same prompt.

    Args:
        steps: Rollouts, each of ``rollout.samples`` replies to ``batch_size`` prompts.
        batch_size: Prompts per rollout.
        epochs: Passes over each rollout.
        minibatches: Updates per pass.
        micro_batch_size: Rows per forward pass, null: a whole minibatch.
        gradient_clip: Largest gradient norm, null: none.
        text_ratio: Rows of pretraining text per reply in the gamma term.
        text_length: Tokens in a row of pretraining text.
        missing_end_penalty: Taken from the score of a reply that did not end by itself.
        score_clip: Scores are clipped to plus or minus this, null: not.
        tolerance: Largest difference between the sampler's log-probabilities and recomputed ones in fp32.
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
        micro_batch_size: Annotated[int, Field(gt=0)] | None = None,
        gradient_clip: Annotated[float, Field(gt=0)] | None = 1.0,
        text_ratio: Annotated[float, Field(gt=0)] = 1.0,
        text_length: Annotated[int, Field(gt=1)] = 64,
        missing_end_penalty: Annotated[float, Field(ge=0)] = 0.0,
        score_clip: Annotated[float, Field(gt=0)] | None = None,
        tolerance: Annotated[float, Field(gt=0)] = 1e-3,
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
            micro_batch_size=micro_batch_size,
            gradient_clip=gradient_clip,
            text_ratio=text_ratio,
            text_length=text_length,
            missing_end_penalty=missing_end_penalty,
            score_clip=score_clip,
            tolerance=tolerance,
        )
        if rollout.samples < 2:
            raise UserError(
                f"rollout.samples={rollout.samples}: the baseline of a reply is the other replies to its prompt; "
                "type rollout.samples=8"
            )
        if not rollout.exact:
            raise UserError(
                "replies must come from the policy's own distribution: "
                "type rollout.top_k=0 rollout.top_p=1 and a rollout.temperature above 0"
            )

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
            self.gather_means(metrics, y.mask & kept[part], counted)
            self.count(len(y), y.attention_mask.sum())
        if self.objective.gamma:
            self.pretraining_term(len(minibatch))
        # Where nothing counted there is no gradient, and momentum alone must not move the policy.
        idle = bool(counted < 0.5) and not self.objective.gamma
        return self.step(frozen=self.policy if idle else None)

    def gather_means(self, metrics: Metrics, mask: Tensor, total: Tensor) -> None:
        """Adds means over tokens to the metrics of this update, whatever the loss is divided by."""
        for name, values in metrics.items():
            mean = weighted_mean(values.float(), mask.float(), total)
            self._sums[name] = self._sums[name] + mean if name in self._sums else mean

    def report(self, rollout: Rollout, scores: Tensor, experience: Replies, metrics: list[Metrics]) -> None:
        """One row per rollout: means over its updates, what the replies are like, and what groups had to teach."""
        samples = self.rollout.samples
        means = {name: torch.stack([row[name] for row in metrics]).mean() for name in metrics[0]}
        self.record(
            {**means, **self.describe(rollout, scores, experience.logp, experience.ref_logp)},
            first_ratio=metrics[0]["ratio"],
            first_approx_kl=metrics[0]["approx_kl"],
            group_std=grouped(scores, samples).std(1).mean(),
            zero_spread=1.0 - has_spread(scores, samples).float().mean(),
            dropped=1.0 - experience.keep.float().mean(),
        )
