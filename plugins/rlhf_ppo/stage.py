"""PPO on a language model (Stiennon et al. 2020, Ouyang et al. 2022).

1. Sample a reply to each prompt from the policy.
2. Score the whole reply; give every token its share of the KL penalty: r_t = -beta log(pi/pi_SFT)_t, + R at the end.
3. Advantages by GAE, whitened over the whole rollout.
4. A few epochs of clipped updates over minibatches, each one optimizer step on L_PPO + gamma * L_pretraining.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from rlhf.data.data import Split
from rlhf.data.records import Prompt
from rlhf.errors import UserError
from rlhf.functional.advantages import explained_variance
from rlhf.functional.reduction import weighted_mean
from rlhf.model_config import no_head, scores
from rlhf.models.language_model import LanguageModel
from rlhf.models.roles import critic_of
from rlhf.objective import Metrics, PolicyObjective
from rlhf.policy_gradient import RolloutStage
from rlhf.rollout import Rollout, Sampler
from rlhf.scoring import Reward
from rlhf.stage import Optimizer, Parts, Schedule, chunks
from rlhf.vocabulary import OWN_CRITIC, check_vocabulary


@dataclass(frozen=True)
class Experience:
    """What an update reads of a rollout. Rows are prompt + reply; the last R columns are the reply."""

    ids: Tensor  # [B, P+R]
    attention_mask: Tensor  # [B, P+R]
    position_ids: Tensor  # [B, P+R]
    loss_mask: Tensor  # [B, P+R], 1 on the reply
    mask: Tensor  # [B, R]
    logp: Tensor  # [B, R], of the policy that sampled
    ref_logp: Tensor  # [B, R]
    values: Tensor  # [B, R]
    advantages: Tensor  # [B, R]
    returns: Tensor  # [B, R]

    def __getitem__(self, rows: Tensor | slice) -> "Experience":
        return Experience(*(getattr(self, field.name)[rows] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.ids)


class PPOStage(RolloutStage):
    """Proximal policy optimisation with a learnt critic.

    Args:
        steps, batch_size, epochs, minibatches, score_clip: As ``RolloutStage``; defaults of PPO.
        value: Where the critic starts: model of a reward run, or null for the policy's own weights and a zero head.
            Either way with an adapter of its own, if the policy has one; the head is trained whole.
        value_warmup: Rollouts at the start that train the critic alone.
        knobs: The others of ``RolloutStage``.
    """

    models_beside = {"reference": False, "value": True}

    def __init__(
        self,
        model: LanguageModel,
        objective: PolicyObjective,
        data: Split,
        text: Split | None,
        reward: Reward,
        rollout: Sampler,
        optimizer: Optimizer,
        scheduler: Schedule,
        *,
        steps: Annotated[int, Field(gt=0)] = 20,
        batch_size: Annotated[int, Field(gt=0)] = 128,
        epochs: Annotated[int, Field(gt=0)] = 2,
        minibatches: Annotated[int, Field(gt=0)] = 4,
        score_clip: Annotated[float, Field(gt=0)] | None = 5.0,
        value: str | None = None,
        value_warmup: Annotated[int, Field(ge=0)] = 0,
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
        self.value_warmup = value_warmup
        self.critic = critic_of(model, value).disable_dropout()

    # -- set-up ---------------------------------------------------------------------------------------------------

    @classmethod
    def check_parts(
        cls,
        *,
        rollout: Sampler | None = None,
        objective: Any = None,
        model: Any = None,
        value: str | None = None,
        steps: int | None = None,
        value_warmup: int = 0,
        **parts: Any,
    ) -> None:
        """As ``Stage.check_parts``."""
        super().check_parts(objective=objective, model=model, **parts)
        if steps is not None and value_warmup >= steps:
            raise UserError(
                f"stage.value_warmup={value_warmup} of stage.steps={steps} rollouts leaves none that trains the "
                f"policy: type stage.steps={value_warmup + 1} or more, or stage.value_warmup=0"
            )
        if scores(value) is False:
            raise no_head("stage.value", value, OWN_CRITIC)
        check_vocabulary(model, value, "stage.value", OWN_CRITIC)
        if value_warmup and getattr(objective, "value_coefficient", None) == 0:
            raise UserError(
                f"stage.value_warmup={value_warmup} trains the critic alone, and objective.value_coefficient=0 does "
                "not train it: type objective.value_coefficient=0.1, or stage.value_warmup=0"
            )
        if rollout is not None and not (rollout.exact and rollout.samples == 1):
            raise UserError(
                "PPO samples one reply per prompt from the policy's own distribution: "
                "type rollout.top_k=0 rollout.top_p=1 rollout.samples=1 and rollout.temperature above 0"
            )

    def modules_trained(self) -> list[nn.Module]:
        """Policy and critic."""
        return [self.policy, self.critic]

    def roles(self) -> dict[str, Any]:
        """The value model too."""
        return super().roles() | {"value": self.critic}

    @property
    def warming(self) -> bool:
        """Whether this rollout trains the critic alone."""
        return self.batches_done < self.value_warmup

    # -- the algorithm --------------------------------------------------------------------------------------------

    def training_step(self, batch: Parts[Prompt], batch_idx: int) -> None:
        """One rollout and the updates on it."""
        rollout = self.rollout.sample(self.policy, list(batch), seed=self.step_seed("sample"))
        raw, scores = self.scores(rollout)
        experience = self.evaluate(rollout, scores)
        kl = self.kl(experience)
        metrics = self.updates(experience, kl)
        self.report(rollout, raw, experience, metrics)
        if not self.warming:  # a policy that stands still has no KL to steer beta by
            self.beta = self.objective.next_beta(self.beta, kl, self.batch_size, self.steps * self.batch_size)

    @torch.no_grad()
    def evaluate(self, rollout: Rollout, scores: Tensor) -> Experience:
        """Log-probabilities, values, advantages and returns of a rollout."""
        inputs = (rollout.ids, rollout.attention_mask, rollout.position_ids, rollout.loss_mask)
        width, temperature = rollout.mask.shape[1], self.rollout.temperature
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for rows in chunks(len(rollout.ids), self.micro_batch_size or self.batch_size // self.minibatches):
            ids, attention_mask, positions, loss_mask = (x[rows] for x in inputs)
            logp, _ = self.policy.logprobs(ids, attention_mask, positions, loss_mask, temperature)
            ref_logp = self.reference.logprobs(ids, attention_mask, positions, loss_mask, temperature)
            values = self.critic.values(ids, attention_mask, positions)  # V_t is read before token t is chosen
            parts.append((logp[:, -width:], ref_logp[:, -width:], values[:, -width - 1 : -1]))
        logp, ref_logp, values = (torch.cat(column) for column in zip(*parts, strict=True))
        self.check_sampler(rollout, logp)
        values = values.float() * rollout.mask
        _, advantages, returns = self.objective.estimate(
            scores, logp, ref_logp, values, rollout.mask, self.beta, self.sum_over_processes
        )
        return Experience(*inputs, rollout.mask, logp, ref_logp, values, advantages, returns)

    def update(self, minibatch: Experience, first: bool) -> Metrics:
        """One optimizer step on L_PPO + gamma * L_pretraining."""
        total = self.total(minibatch.mask.sum())
        for part in chunks(len(minibatch), self.micro_batch_size):
            x = minibatch[part]
            width = x.mask.shape[1]
            logp, entropy = self.policy.logprobs(
                x.ids, x.attention_mask, x.position_ids, x.loss_mask, self.rollout.temperature, entropy=True
            )
            assert entropy is not None
            logp, entropy = logp[:, -width:], entropy[:, -width:]
            values = self.critic.values(x.ids, x.attention_mask, x.position_ids)[:, -width - 1 : -1].float()
            losses, metrics = self.objective(logp, x.logp, x.advantages, values, x.values, x.returns, entropy)
            if first:
                self.check_ratio(metrics["ratio"], x.mask)
            self.backward_mean(losses, x.mask, total, metrics)
            self.count(len(x), x.attention_mask.sum())
        if self.objective.gamma and not self.warming:
            self.pretraining_term(len(minibatch))
        return self.step(frozen=self.policy if self.warming else None)  # waits for a critic that has seen some returns

    # -- what is logged -------------------------------------------------------------------------------------------

    def report(self, rollout: Rollout, raw: Tensor, experience: Experience, metrics: list[Metrics]) -> None:
        """One row per rollout: means over its updates, if there were any, and what the replies are like."""
        x = experience
        self.record(
            {**self.of_updates(metrics), **self.describe(rollout, raw, experience.logp, experience.ref_logp)},
            explained_variance=explained_variance(x.values, x.returns, x.mask, self.sum_over_processes),
            value=weighted_mean(x.values, x.mask.float(), self.total(x.mask.sum())),
            beta=self.beta,
        )

    def save(self, folder: Path) -> None:
        """The policy; the critic beside it, its adapter within."""
        super().save(folder)
        self.critic.save(folder.parent / "critic")
