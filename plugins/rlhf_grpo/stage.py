"""Group relative policy optimization (DeepSeekMath, arXiv 2402.03300); Dr. GRPO, DAPO and GSPO by their objectives.

1. Sample K responses to each prompt from the policy.
2. Score each response.
3. The advantage of a response is its score relative to the other responses to the prompt, the same for all its tokens.
4. Clipped updates over the rollout, each one optimizer step on L_GRPO + gamma * L_pretraining.
"""

from rlhf.data.records import Prompt
from rlhf.stage.batch_order import Parts
from rlhf.stage.experience import Experience
from rlhf.stage.group_stage import GroupStage


class GRPOStage(GroupStage):
    """Stage of group relative policy optimization."""

    def training_step(self, batch: Parts[Prompt], batch_idx: int) -> None:
        """Sample one rollout and make the updates on it."""
        rollout = self.sample_rollout(list(batch))
        rollout = self.resample_groups(rollout)
        raw, scores = self.scores(rollout)
        logp, ref_logp = self.rollout_logprobs(rollout)
        advantages, keep = self.objective.advantages(
            scores, logp, ref_logp, rollout.mask, self.sampler.samples, self.sum_over_ranks
        )
        weights = self.sampler_weights(rollout, logp)
        experience = Experience(
            rollout.tokens, rollout.mask, logp, ref_logp, advantages, keep=keep, sampler_weights=weights
        )
        metrics = []
        if self.is_within_kl_budget(self.kl(experience)):
            for minibatch, first in self.draw_minibatches(experience):
                metrics.append(self.update(minibatch, first))
        self.report(rollout, raw, scores, experience, metrics)
