"""Group relative policy optimisation (DeepSeekMath, arXiv 2402.03300), Dr. GRPO, DAPO and GSPO by their objectives.

1. Sample K replies to each prompt from the policy.
2. Score each reply.
3. The advantage of a reply is its score against those of the other replies to the prompt; all its tokens get it.
4. Clipped updates over the rollout, each one optimizer step on L_GRPO + gamma * L_pretraining.
"""

from rlhf.critic_free import GroupStage, Replies
from rlhf.data.records import Prompt
from rlhf.stage import Parts


class GRPOStage(GroupStage):
    """Group relative policy optimisation."""

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
