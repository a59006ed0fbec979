"""Who says which reply is better: K replies per prompt in, one graded comparison per prompt out."""

import random
from dataclasses import replace
from typing import Annotated, Protocol

from pydantic import Field

from rlhf.data.records import GRADES, TIE, Comparison, Message
from rlhf.data.testbed import label
from rlhf.data.testbed.world import Aspect
from rlhf.rollout import Rollout
from rlhf.scoring import Reward


class Annotator(Protocol):
    """What an annotator is to the stages.

    It may also have ``to(device)`` to move its weights; ``open(folder)`` for what it keeps from run to run; and
    ``counts``, a Counter of what happened in the last call, with ``rates(counts)`` that turns the sum over a run into
    numbers for its summary.
    """

    def __call__(self, rollout: Rollout, samples: int, seed: int) -> list[Comparison]:
        """One comparison for each group of ``samples`` rows; groups without a preference are left out.

        A comparison gets the cluster of its prompt from the rollout, and ``ended`` if it has none (``completed``).
        """
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
        """Graded by gaps of gold score, as seen with the error."""
        rng = random.Random(seed)
        made = []
        for start in range(0, len(rollout.texts), samples):
            group, ended = slice(start, start + samples), rollout.ended[start : start + samples].tolist()
            made.append(label(rollout.prompts[start], rollout.texts[group], rng, self.noise, self.aspect, ended))
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
                    ended=tuple(rollout.ended[rows].tolist()),
                )
            )
        return [comparison for comparison in made if comparison.pairs()]

    def grade(self, gap: float) -> str:
        """The grade of a gap of score."""
        return TIE if gap <= self.tie else GRADES[sum(gap >= threshold for threshold in self.thresholds)]


def completed(rollout: Rollout, comparisons: list[Comparison]) -> list[Comparison]:
    """Add what annotators need not know: the cluster of each prompt, and which responses were cut off.

    Annotators may mark cut responses themselves. Of equal responses to one prompt, the first in the rollout is the
    first in the comparison.
    """
    clusters = {prompt.messages: prompt.cluster for prompt in rollout.prompts}
    marks: dict[tuple[tuple[Message, ...], str], list[bool]] = {}
    for prompt, text, ended in zip(rollout.prompts, rollout.texts, rollout.ended.tolist(), strict=True):
        marks.setdefault((prompt.messages, text), []).append(ended)
    done = []
    for comparison in comparisons:
        comparison = replace(comparison, cluster=comparison.cluster or clusters.get(comparison.prompt, ""))
        if comparison.ended is None:
            rows = [marks.get((comparison.prompt, text)) or [True] for text in comparison.responses]
            comparison = replace(comparison, ended=tuple(row.pop(0) if len(row) > 1 else row[0] for row in rows))
        done.append(comparison)
    return done
