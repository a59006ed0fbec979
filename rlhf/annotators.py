"""Who says which reply is better: K replies per prompt in, one graded comparison per prompt out."""

import random
from typing import Annotated, Protocol

from pydantic import Field

from rlhf.data.records import GRADES, TIE, Comparison
from rlhf.data.testbed import label
from rlhf.data.testbed.world import Aspect
from rlhf.rollout import Rollout
from rlhf.scoring import Reward


class Annotator(Protocol):
    """What an annotator is to the stages."""

    def __call__(self, rollout: Rollout, samples: int, seed: int) -> list[Comparison]:
        """One comparison for each group of ``samples`` rows; groups without a preference are left out."""
        ...


class GoldAnnotator:
    """The testbed's labeller, with the errors a human one makes.

    Args:
        noise: Standard deviation of the error on each judged score, in units of the gold score.
        aspect: What is judged: "total" (safety of replies to unsafe prompts, helpfulness of the others), or
            "helpfulness" or "safety" alone, for two reward models in the manner of Llama 2.
    """

    def __init__(self, noise: Annotated[float, Field(ge=0)] = 0.05, aspect: Aspect = "total") -> None:
        self.noise, self.aspect = noise, aspect

    def __call__(self, rollout: Rollout, samples: int, seed: int) -> list[Comparison]:
        """Graded by gaps of gold score."""
        rng = random.Random(seed)
        groups = range(0, len(rollout.texts), samples)
        made = [label(rollout.prompts[i], rollout.texts[i : i + samples], rng, self.noise, self.aspect) for i in groups]
        return [comparison for comparison in made if comparison.pairs()]


class RewardAnnotator:
    """A reward as annotator: ranks by its scores.

    Args:
        reward: Any reward.
        thresholds: Smallest gaps of score that count as slightly better, better and significantly better.
        tie: Gaps below this are ties and make no pair.
    """

    def __init__(
        self,
        reward: Reward,
        thresholds: tuple[float, float, float] = (0.5, 1.0, 2.0),
        tie: Annotated[float, Field(ge=0)] = 0.0,
    ) -> None:
        self.reward, self.thresholds, self.tie = reward, tuple(thresholds), tie

    def __call__(self, rollout: Rollout, samples: int, seed: int) -> list[Comparison]:
        """Graded by gaps of reward."""
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
                )
            )
        return [comparison for comparison in made if comparison.pairs()]

    def grade(self, gap: float) -> str:
        """The grade of a gap of score."""
        return TIE if gap <= self.tie else GRADES[sum(gap >= threshold for threshold in self.thresholds)]
