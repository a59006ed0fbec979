"""REINFORCE leave-one-out (Kool et al. 2019; for language models Ahmadian et al. 2024, arXiv 2402.14740).

1. Sample K replies to each prompt from the policy.
2. The reward of a reply is its score less beta times its KL from the reference: a reply is one action.
3. The baseline of a reply is the mean reward of the other K - 1.
4. A policy-gradient step on whole replies, clipped where a rollout is used more than once, + gamma * L_pretraining.
"""

from rlhf.critic_free import GroupStage, Replies
from rlhf.data.records import Prompt
from rlhf.stage import Parts


class RLOOStage(GroupStage):
    """REINFORCE with a leave-one-out baseline."""

    def training_step(self, batch: Parts[Prompt], batch_idx: int) -> None:
        """One rollout and the updates on it."""
        rollout = self.rollout.sample(self.policy, list(batch), seed=self.step_seed("sample"))
        rollout = self.refilled(rollout)
        raw, scores = self.scores(rollout)
        logp, ref_logp = self.log_probabilities(rollout)
        advantages, keep = self.objective.advantages(
            scores, logp, ref_logp, rollout.mask, self.rollout.samples, self.sum_over_processes
        )
        experience = Replies.of(rollout, logp, ref_logp, advantages, keep)
        metrics = self.updates(experience, self.kl(experience))
        self.report(rollout, raw, scores, experience, metrics)
