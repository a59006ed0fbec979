"""Reward annotator: ranks responses by the scores of a reward."""

from typing import Annotated

from pydantic import Field

from rlhf.annotator.base import Annotator
from rlhf.data.records import GRADES, TIE, Comparison
from rlhf.reward.base import Reward
from rlhf.sampler.rollout import Rollout


class RewardAnnotator(Annotator):
    """Annotator that ranks responses by the scores of a reward.

    Args:
        reward: Any reward.
        thresholds: Smallest score gaps of slightly better, better and significantly better.
        tie: Gaps up to this are ties and make no pair.
    """

    def __init__(
        self,
        reward: Reward,
        thresholds: tuple[float, float, float] = (0.5, 1.0, 2.0),
        tie: Annotated[float, Field(ge=0)] = 0.0,
    ) -> None:
        self.reward, self.thresholds, self.tie = reward, tuple(thresholds), tie
        self.rewards = {"reward": reward}

    def __call__(self, rollout: Rollout, samples: int, seed: int) -> list[Comparison]:
        """Return comparisons graded by score gaps."""
        scores = self.reward(rollout).tolist()
        made = []
        for start in range(0, len(scores), samples):
            rows = sorted(range(start, start + samples), key=lambda row: -scores[row])
            ranked = [scores[row] for row in rows]
            prompt = rollout.prompts[start]
            made.append(
                Comparison(
                    prompt=prompt.messages,
                    responses=tuple(rollout.texts[row] for row in rows),
                    grades=tuple(
                        self.grade(ranked[i] - ranked[j]) for i in range(samples) for j in range(i + 1, samples)
                    ),
                    scores=tuple(ranked),
                    tags=prompt.tags,
                    ended=tuple(rollout.ended[rows].tolist()),
                )
            )
        return [comparison for comparison in made if comparison.pairs()]

    def grade(self, gap: float) -> str:
        """Return the grade of a score gap."""
        return TIE if gap <= self.tie else GRADES[sum(gap >= threshold for threshold in self.thresholds)]
