"""Scores, KL and signs of reward hacking of a stage that samples, in training and in validation."""

from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor, nn

from rlhf.callbacks.reward_hacking import (
    count_clusters,
    has_gold,
    proxy_gold_gap,
    proxy_gold_gap_error,
    response_metrics,
)
from rlhf.data.records import Prompt
from rlhf.functional.advantages import sequence_kl
from rlhf.functional.kl import k3
from rlhf.functional.masking import masked_mean
from rlhf.functional.sampler_mismatch import probability_errors
from rlhf.models.offload import Offload
from rlhf.models.reference import Reference
from rlhf.models.sharding import gathered
from rlhf.objective import Metrics
from rlhf.reward.base import Reward
from rlhf.reward.model import find_model_rewards
from rlhf.sampler.base import Sampler, single
from rlhf.sampler.rollout import Rollout, joined, pad_and_concatenate
from rlhf.stage.base import Stage
from rlhf.stage.batch_order import Parts
from rlhf.stage.experience import Experience, chunks, response_logprobs

#: Prompts of each part of the data that measure the baseline: standard error of the gap about 0.03 deviations.
START = 512


class RolloutMetrics(Stage):
    """Part of a rollout stage that describes rollouts and validates the policy."""

    reward: Reward
    sampler: Sampler
    reference: Reference
    beta: float
    validation_rollouts: list[tuple[Rollout, Tensor, Tensor]]  # of held-out prompts, until they are described
    start: dict[str, dict[str, float]]  # scores before training, by part of the data
    offload_frozen: bool
    _offloaded: dict[str, Offload]  # "reference" and "reward", if they are offloaded

    def offloadable(self) -> dict[str, list[nn.Module]]:
        """Return the frozen models whose weights no trained model shares: those of "reference" and of "reward"."""
        models = [reward.model for reward in find_model_rewards(self.reward).values()]
        found: dict[str, list[nn.Module]] = {"reward": [x for x in models if x.language_model.shared is None]}
        if not self.reference.shared:
            found["reference"] = [self.reference.modules[0]]
        return {name: models for name, models in found.items() if models}

    def frozen_on_device(self, name: str) -> AbstractContextManager[None]:
        """Return a context in which the models of "reference" or "reward" are on the device."""
        offload = self._offloaded.get(name)
        return nullcontext() if offload is None else offload.loaded(self.device)

    def raw_scores(self, rollout: Rollout) -> Tensor:
        """Return the reward's scores of the responses, [B] float32."""
        with self.frozen_on_device("reward"):
            return self.reward(rollout).float()

    def shape_scores(self, raw: Tensor, ended: Tensor) -> Tensor:
        """Return the scores that are trained on, [B], from those of the reward, [B]."""
        raise NotImplementedError

    def ema_weights(self) -> AbstractContextManager[None]:
        """Context manager: the policy has the weights that will be saved."""
        raise NotImplementedError

    @torch.no_grad()
    def measure_start(self) -> None:
        """Score the policy before training, where gold is known: the baseline of `proxy_gold_gap`.

        Each part of the data has its own baseline, measured on up to `START` of its prompts: the first rollout alone
        would be too noisy, and prompts that the policy was fine-tuned on differ from held-out ones. A resumed run reads
        it from its checkpoint.
        """
        validated = self.held_out if self.trainer.limit_val_batches else []
        for part, prompts in (("train", self.examples), ("validation", validated)):
            prompts = prompts[:START]
            mine = prompts[self.trainer.global_rank :: self.trainer.world_size]
            if part in self.start or len(prompts) < 2 * self.trainer.world_size or not has_gold(prompts[0]):
                continue
            sampler, size = single(self.sampler), self.batch_size // self.trainer.world_size
            with gathered(self.policy):
                rollouts = [
                    sampler.sample(self.policy, list(mine[rows]), self.step_seed(f"start {part}", rows.start))
                    for rows in chunks(len(mine), size)
                ]
            whole = joined(rollouts, self.policy.pad_id)
            found = response_metrics(whole, self.raw_scores(whole), together=True)
            names = ("score", "score_std", "gold", "gold_std", "gold_correlation")
            self.start[part] = {name: found[name].item() for name in names}
            self.start[part]["clusters"] = count_clusters(whole.prompts)

    @property
    def is_exact(self) -> bool:
        """Return whether arithmetic is fp32 or fp64, where two computations of one number may be compared."""
        return self.trainer.precision in ("32-true", "64-true")

    @property
    def trusts_sampler(self) -> bool:
        """Return whether the sampler's log-probabilities are the policy's: it samples from it itself, in fp32."""
        return self.is_exact and self.sampler.matches_policy

    def describe(self, rollout: Rollout, raw: Tensor, logp: Tensor, ref_logp: Tensor) -> Metrics:
        """Return scores, KL (nats per response) and the signs of reward hacking.

        Collective: every rank must call it. Response diagnostics and spreads cover the responses of all ranks; the
        other means cover this rank's responses.
        """
        kl = sequence_kl(logp, ref_logp, rollout.mask)
        shaped = self.shape_scores(raw, rollout.ended)
        metrics = {
            **response_metrics(rollout, raw, together=True),
            "shaped_score": shaped.mean(),
            "kl": kl.mean(),
            "kl_k3": (k3(logp, ref_logp) * rollout.mask).sum(1).mean(),
            "rlhf_reward": (shaped - self.beta * kl).mean(),
            **{f"reward/{name}": value for name, value in self.reward.parts.items()},
            **({} if self.trusts_sampler else self.sampler_mismatch(rollout, logp)),
        }
        start = self.start.get("train" if self.trainer.training else "validation")
        if "gold" in metrics and start:
            metrics["proxy_gold_gap"] = proxy_gold_gap(metrics, start)
            error = proxy_gold_gap_error(metrics, start, count_clusters(rollout.prompts), int(start["clusters"]))
            metrics["proxy_gold_gap_se"] = raw.new_tensor(error)
        return metrics

    def sampler_mismatch(self, rollout: Rollout, logp: Tensor) -> Metrics:
        """Return means over tokens of the difference between the sampler's log-probabilities and the policy's."""
        errors, gaps = probability_errors(logp, rollout.logp, rollout.mask)
        return {
            "token_mult_prob_error": masked_mean(errors, rollout.mask),
            "sampler_gap": masked_mean(gaps, rollout.mask),
        }

    def average_updates(self, metrics: list[Metrics]) -> Metrics:
        """Return means over the updates on a rollout, and the first one's ratio (must be 1) and approx_kl (must be 0).

        Empty without updates.
        """
        if not metrics:
            return {}
        names = {name: None for row in metrics for name in row}  # a skipped step has no gradient norm
        means = {name: torch.stack([row[name] for row in metrics if name in row]).mean() for name in names}
        return {**means, "first_ratio": metrics[0]["ratio"], "first_approx_kl": metrics[0]["approx_kl"]}

    def enter_validation(self, context: ExitStack) -> None:
        """Validate the weights that will be saved."""
        context.enter_context(self.ema_weights())
        context.enter_context(self.frozen_on_device("reference"))
        super().enter_validation(context)

    def on_validation_epoch_start(self) -> None:
        """Reset the validation responses."""
        super().on_validation_epoch_start()
        self.validation_rollouts = []

    @torch.no_grad()
    def validation_step(self, batch: Parts[Prompt], batch_idx: int) -> None:
        """Sample responses to held-out prompts and keep their log-probabilities."""
        rollout = self.sampler.sample(self.policy, list(batch), seed=self.step_seed("validation", batch_idx))
        size, temperature = len(rollout.texts), self.sampler.temperature
        logp, ref_logp = response_logprobs(self.policy, self.reference, rollout, temperature, size)
        self.validation_rollouts.append((rollout, logp, ref_logp))

    @torch.no_grad()
    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all validation responses at once, so that spreads do not depend on batches."""
        rollouts, logps, ref_logps = zip(*self.validation_rollouts, strict=True)
        self.validation_rollouts, whole = [], joined(rollouts, self.policy.pad_id)
        with self.trainer.precision_plugin.forward_context():
            raw = self.raw_scores(whole)
            metrics = self.describe(whole, raw, pad_and_concatenate(logps), pad_and_concatenate(ref_logps))
        for name, value in metrics.items():
            self.log_share(f"val/{name}", torch.as_tensor(value), len(raw))
        super().on_validation_epoch_end()

    def prompts_to_show(self) -> list[Prompt]:
        """Return the held-out prompts."""
        return list(self.held_out)

    def mean_over_ranks(self, values: Tensor) -> float:
        """Return the mean of values [B] over all ranks."""
        total, count = self.sum_over_ranks(torch.stack([values.sum(), values.new_tensor(len(values))])).tolist()
        return total / count

    def kl(self, experience: Experience) -> float:
        """Return the KL from the reference, nats per response: the mean over the responses of all ranks."""
        return self.mean_over_ranks(sequence_kl(experience.logp, experience.ref_logp, experience.mask))
