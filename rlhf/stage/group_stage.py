"""Base class of reinforcement learning without a critic: K responses per prompt, each baseline made of the others.

GRPO and RLOO differ in their objectives and in nothing defined here.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from rlhf.data.records import Prompt
from rlhf.data.split import Split
from rlhf.errors import UserError, key
from rlhf.functional.groups import grouped, has_spread
from rlhf.functional.scores import missing_eos
from rlhf.models.language_model import LanguageModel
from rlhf.models.sharding import gathered, is_sharded
from rlhf.objective import GroupObjective, Metrics
from rlhf.reward.base import Reward
from rlhf.sampler.base import Sampler
from rlhf.sampler.dynamic_sampling import fresh_prompts, replace_groups
from rlhf.sampler.rollout import Rollout
from rlhf.stage.experience import Experience, chunks
from rlhf.stage.rollout_stage import RolloutStage
from rlhf.stage.update import Optimizer, Schedule

__all__ = ["GroupStage"]


class GroupStage(RolloutStage):
    """Base class of stages whose baseline is the other responses to the same prompt.

    Args:
        hyperparameters: Those of ``RolloutStage``; a rollout has ``sampler.samples`` responses to each prompt.
        max_resamples: Most attempts per rollout at dynamic sampling (DAPO): groups whose responses all score the same
            are replaced by groups of freshly sampled prompts. 0: such groups stay.
    """

    shardable = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "steps": 40,
        "batch_size": 32,
        "epochs": 1,
        "minibatches": 1,
        "score_clip": None,
    }

    def __init__(
        self,
        model: LanguageModel,
        objective: GroupObjective,
        data: Split,
        text: Split | None,
        reward: Reward,
        sampler: Sampler,
        optimizer: Optimizer,
        scheduler: Schedule,
        *,
        max_resamples: Annotated[int, Field(ge=0)] = 0,
        **hyperparameters: Any,
    ) -> None:
        super().__init__(model, objective, data, text, reward, sampler, optimizer, scheduler, **hyperparameters)
        self.max_resamples = max_resamples
        self.first_draw: Metrics = {}

    @classmethod
    def check_parts(cls, *, sampler: Sampler | None = None, **parts: Any) -> None:
        """Validate as ``Stage.check_parts``; require 2 or more samples per prompt, drawn from the policy itself."""
        super().check_parts(**parts)
        if sampler is not None and sampler.samples < 2:
            raise UserError(
                "must be 2 or more: the baseline of a response is the other responses to its prompt",
                fix=f"type {key('sampler.samples', 8)}",
                option="sampler.samples",
                value=sampler.samples,
            )
        if sampler is not None and not sampler.exact:
            overrides = f"{key('sampler.top_k', 0)} {key('sampler.top_p', 1)}"
            raise UserError(
                "responses must come from the policy's own distribution",
                fix=f"type {overrides} and {key('sampler.temperature')} above 0",
                option="sampler",
            )

    @torch.no_grad()
    def resample_groups(self, rollout: Rollout) -> Rollout:
        """Replace zero-variance groups by freshly sampled prompts (DAPO's dynamic sampling).

        Makes at most ``max_resamples`` attempts; with 0 the rollout is returned unchanged. Groups for which no
        replacement was found stay. Sets ``first_draw``, the metrics of the rollout before the replacement.
        """
        if not self.max_resamples:
            return rollout

        def scores(sampled: Rollout) -> Tensor:
            raw = self.raw_scores(sampled)
            if self.normalize_scores == "none":
                return self.shape_scores(raw, sampled.ended)
            # Normalization maps equal scores to equal ones, and its moments must come from the final rollout.
            return missing_eos(raw, sampled.ended, self.missing_eos_penalty, self.missing_eos)

        def sample(prompts: list[Prompt], index: int) -> Rollout:
            return self.sampler.sample(self.policy, prompts, seed=self.step_seed(f"refill {index}"))

        samples = self.sampler.samples
        others = fresh_prompts(self.examples, rollout.prompts, self.step_seed("further prompts"))
        with gathered(self.policy):  # ranks differ in their number of attempts
            limits = samples, self.max_resamples, self.policy.pad_id
            final, asked = replace_groups(rollout, scores, sample, others, *limits)
        self.first_draw = {
            "drawn_score": self.raw_scores(rollout).mean(),
            "drawn_zero_spread": 1.0 - has_spread(scores(rollout), samples).float().mean(),
            "resampled": torch.tensor(asked * samples / len(rollout.texts), device=rollout.mask.device),
        }
        return final

    def update(self, minibatch: Experience, first: bool) -> Metrics:
        """Make one optimizer step on the objective + gamma * L_pretraining."""
        # Dropped responses have weight 0. Leaving them out saves time; sharded ranks must make equal numbers of passes.
        x = minibatch if is_sharded(self.policy) else minibatch.kept()
        assert x.keep is not None
        kept = x.keep.unsqueeze(1)
        weights, divisor = self.objective.weights(x.mask, self.sampler.longest)
        weights, total = weights * kept, self.loss_denominator((divisor * x.keep).sum())
        counted = self.loss_denominator((x.mask & kept).sum())
        for part in chunks(len(x), self.micro_batch_size):
            y = x[part]
            logp, entropy = self.policy.logprobs(y.tokens, self.sampler.temperature, entropy=True)
            assert entropy is not None
            logp, entropy = logp[:, -x.width :], entropy[:, -x.width :]
            if first:
                self.check_first(logp, y.logp, y.mask)
            losses, metrics = self.objective(logp, y.logp, y.ref_logp, y.advantages, y.mask, entropy, **y.correction)
            self.backward_mean(losses, weights[part], total)
            self.gather_means(metrics, y.mask & kept[part], counted)  # token means, whatever the loss divides by
            self.count(len(y), y.tokens.attention_mask.sum())
        if self.objective.gamma:
            self.pretraining_term(len(minibatch))
        # Without a counted response there is no gradient, and momentum alone must not move the policy.
        idle = bool(counted < 0.5) and not self.objective.gamma
        return self.step(frozen=self.policy if idle else None)

    def report(
        self, rollout: Rollout, raw: Tensor, scores: Tensor, experience: Experience, metrics: list[Metrics]
    ) -> None:
        """Log one row per rollout: means over its updates, response diagnostics, and the spread within groups."""
        samples = self.sampler.samples
        self.record(
            {
                **self.average_updates(metrics),
                **self.describe(rollout, raw, experience.logp, experience.ref_logp),
                **self.first_draw,
                **self.correction,
            },
            group_std=grouped(scores, samples).std(1).mean(),
            zero_spread=1.0 - has_spread(scores, samples).float().mean(),
            dropped=0.0 if experience.keep is None else 1.0 - experience.keep.float().mean(),
        )
