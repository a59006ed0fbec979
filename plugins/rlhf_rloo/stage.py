"""REINFORCE leave-one-out (Kool et al. 2019; for language models Ahmadian et al. 2024, arXiv 2402.14740).

1. Sample K responses to each prompt from the policy.
2. The reward of a response is its score minus beta times its KL from the reference: a response is one action.
3. The baseline of a response is the mean reward of the other K - 1.
4. Make a policy-gradient step on whole responses, clipped if a rollout is used more than once, + gamma * L_pretraining.
"""

from rlhf.data.records import Prompt
from rlhf.stage.batch_order import Parts
from rlhf.stage.experience import Experience
from rlhf.stage.group_stage import GroupStage


class RLOOStage(GroupStage):
    """Stage of REINFORCE with a leave-one-out baseline."""

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
