"""PPO on a language model (Stiennon et al. 2020, Ouyang et al. 2022).

1. Sample a response to each prompt from the policy.
2. Score the whole response; the reward of token t is r_t = -beta log(pi/pi_SFT)_t, plus the score R at the last token.
3. Estimate advantages by GAE, whitened over the whole rollout.
4. Make a few epochs of clipped updates over minibatches, each one optimizer step on L_PPO + gamma * L_pretraining.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from rlhf.data.collate import TokenBatch
from rlhf.data.records import Prompt
from rlhf.data.split import Split
from rlhf.errors import UserError, key
from rlhf.functional.advantages import explained_variance
from rlhf.functional.reduction import weighted_mean
from rlhf.models.auxiliary_models import load_critic
from rlhf.models.language_model import LanguageModel
from rlhf.models.saved_config import is_scalar_model, missing_head_error
from rlhf.models.vocabulary import OWN_CRITIC, check_vocabulary
from rlhf.objective import Metrics, PolicyObjective
from rlhf.reward.base import Reward
from rlhf.sampler.base import Sampler
from rlhf.sampler.rollout import Rollout
from rlhf.stage.batch_order import Parts
from rlhf.stage.experience import Experience, chunks
from rlhf.stage.rollout_stage import RolloutStage
from rlhf.stage.update import Optimizer, Schedule


class PPOStage(RolloutStage):
    """Stage of proximal policy optimization with a trained critic.

    Args:
        hyperparameters: Those of ``RolloutStage``.
        value: Model of a reward run from which the critic starts, or null for the policy's own weights and a zero head.
            In both cases the critic has its own adapter, if the policy has one; the head is trained in full.
        value_warmup: Rollouts at the start that train the critic alone.
    """

    auxiliary_models = {"reference": False, "value": True}
    shardable = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "steps": 20,
        "batch_size": 128,
        "epochs": 2,
        "minibatches": 4,
        "score_clip": 5.0,
    }

    def __init__(
        self,
        model: LanguageModel,
        objective: PolicyObjective,
        data: Split,
        text: Split | None,
        reward: Reward,
        sampler: Sampler,
        optimizer: Optimizer,
        scheduler: Schedule,
        *,
        value: str | None = None,
        value_warmup: Annotated[int, Field(ge=0)] = 0,
        **hyperparameters: Any,
    ) -> None:
        super().__init__(model, objective, data, text, reward, sampler, optimizer, scheduler, **hyperparameters)
        self.value_warmup = value_warmup
        self.critic = load_critic(model, value).disable_dropout()

    # -- set-up ---------------------------------------------------------------------------------------------------

    @classmethod
    def check_parts(
        cls,
        *,
        sampler: Sampler | None = None,
        objective: Any = None,
        model: Any = None,
        value: str | None = None,
        steps: int | None = None,
        value_warmup: int = 0,
        **parts: Any,
    ) -> None:
        """Validate as ``RolloutStage.check_parts``; also the sampler, the critic's start and its warmup."""
        super().check_parts(objective=objective, model=model, **parts)
        if steps is not None and value_warmup >= steps:
            raise UserError(
                f"leaves none of the {key('stage.steps', steps)} rollouts to train the policy",
                fix=f"type {key('stage.steps', value_warmup + 1)} or more, or {key('stage.value_warmup', 0)}",
                option="stage.value_warmup",
                value=value_warmup,
            )
        if is_scalar_model(value) is False:
            raise missing_head_error("stage.value", value, OWN_CRITIC)
        check_vocabulary(model, value, "stage.value", OWN_CRITIC)
        if value_warmup and getattr(objective, "value_coefficient", None) == 0:
            raise UserError(
                f"trains the critic alone, and {key('objective.value_coefficient', 0)} does not train it",
                fix=f"type {key('objective.value_coefficient', 0.1)}, or {key('stage.value_warmup', 0)}",
                option="stage.value_warmup",
                value=value_warmup,
            )
        if sampler is not None and not (sampler.exact and sampler.samples == 1):
            overrides = [key("sampler.top_k", 0), key("sampler.top_p", 1), key("sampler.samples", 1)]
            raise UserError(
                "PPO samples one response per prompt from the policy's own distribution",
                fix=f"type {' '.join(overrides)} and {key('sampler.temperature')} above 0",
                option="sampler",
            )

    def modules_trained(self) -> list[nn.Module]:
        """Return the policy and the critic."""
        return [self.policy, self.critic]

    def roles(self) -> dict[str, Any]:
        """Return the models of ``RolloutStage`` and the value model, by role."""
        return super().roles() | {"value": self.critic}

    @property
    def in_value_warmup(self) -> bool:
        """Return whether this rollout trains the critic alone."""
        return self.batches_done < self.value_warmup

    # -- the algorithm --------------------------------------------------------------------------------------------

    def training_step(self, batch: Parts[Prompt], batch_idx: int) -> None:
        """Sample one rollout and make the updates on it."""
        rollout = self.sample_rollout(list(batch))
        raw, scores = self.scores(rollout)
        experience = self.evaluate(rollout, scores)
        kl, metrics = self.kl(experience), []
        if self.is_within_kl_budget(kl):
            for minibatch, first in self.draw_minibatches(experience):
                metrics.append(self.update(minibatch, first))
        self.report(rollout, raw, experience, metrics)
        if not self.in_value_warmup:  # a frozen policy has no KL to adapt beta to
            self.beta = self.objective.next_beta(self.beta, kl, self.batch_size, self.steps * self.batch_size)

    def rows_per_pass(self, rollout: Rollout) -> int:
        """Return the rows per forward pass over a whole rollout: those of a micro-batch, or else of a minibatch.

        The minibatch is that of all ranks, which one rank's rollout may be shorter than.
        """
        return self.micro_batch_size or self.batch_size // self.minibatches

    @torch.no_grad()
    def evaluate(self, rollout: Rollout, scores: Tensor) -> Experience:
        """Compute log-probabilities, values, advantages and returns of a rollout."""
        logp, ref_logp = self.rollout_logprobs(rollout)
        tokens, width, size = rollout.tokens, rollout.mask.shape[1], self.rows_per_pass(rollout)
        values = torch.cat([self.response_values(tokens[rows], width) for rows in chunks(len(logp), size)])
        values = values * rollout.mask
        _, advantages, returns = self.objective.estimate(
            scores, logp, ref_logp, values, rollout.mask, self.beta, self.sum_over_ranks
        )
        weights = self.sampler_weights(rollout, logp)
        return Experience(
            rollout.tokens, rollout.mask, logp, ref_logp, advantages, values, returns, sampler_weights=weights
        )

    def response_values(self, tokens: TokenBatch, width: int) -> Tensor:
        """Return the critic's values [B, R] of the response tokens: V_t is read before token t is chosen."""
        return self.critic.values(tokens)[:, -width - 1 : -1].float()

    def update(self, minibatch: Experience, first: bool) -> Metrics:
        """Make one optimizer step on L_PPO + gamma * L_pretraining."""
        total = self.loss_denominator(minibatch.mask.sum())
        for part in chunks(len(minibatch), self.micro_batch_size):
            x = minibatch[part]
            logp, entropy = self.policy.logprobs(x.tokens, self.sampler.temperature, entropy=True)
            assert entropy is not None
            logp, entropy = logp[:, -x.width :], entropy[:, -x.width :]
            values = self.response_values(x.tokens, x.width)
            if first:
                self.check_first(logp, x.logp, x.mask)
            losses, metrics = self.objective(
                logp, x.logp, x.advantages, values, x.values, x.returns, entropy, **x.correction
            )
            self.backward_mean(losses, x.mask, total, metrics)
            self.count(len(x), x.tokens.attention_mask.sum())
        if self.objective.gamma and not self.in_value_warmup:
            self.pretraining_term(len(minibatch))
        return self.step(
            frozen=self.policy if self.in_value_warmup else None
        )  # the policy waits until the critic has seen some returns

    # -- logging --------------------------------------------------------------------------------------------------

    def report(self, rollout: Rollout, raw: Tensor, experience: Experience, metrics: list[Metrics]) -> None:
        """Log one row per rollout: means over its updates, if there were any, and response diagnostics."""
        x = experience
        assert x.values is not None and x.returns is not None
        self.record(
            {
                **self.average_updates(metrics),
                **self.describe(rollout, raw, experience.logp, experience.ref_logp),
                **self.correction,
            },
            explained_variance=explained_variance(x.values, x.returns, x.mask, self.sum_over_ranks),
            value=weighted_mean(x.values, x.mask.float(), self.loss_denominator(x.mask.sum())),
            beta=self.beta,
        )

    def save(self, folder: Path) -> None:
        """Write the policy, and the critic (adapter merged in) to the directory ``critic`` beside it."""
        super().save(folder)
        self.critic.save(folder.parent / "critic")
