"""Annotator interface: takes K responses per prompt, returns one graded comparison per prompt."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch

from rlhf.data.records import Comparison, Message
from rlhf.data.testbed.world import Aspect
from rlhf.reward.base import Reward
from rlhf.sampler.rollout import Rollout

__all__ = ["Annotator", "completed"]


class Annotator(ABC):
    """Base class of annotators. An annotator defines ``__call__``; every other member has a default.

    The defaults of an annotator that reads no rewards do nothing.

    Attributes:
        aspect: What it judges: "total" (the default), or "helpfulness" or "safety" alone. Responses are sampled anew
            for each aspect, and the agreement with the testbed's gold is of this aspect.
        rewards: The rewards whose scores it reads, by name; none by default. Their models are loaded with the stage's.
        counts: Counts of events of the last call, by name, which the stage sums over the run; none by default.
    """

    aspect: Aspect = "total"
    rewards: Mapping[str, Reward] = MappingProxyType({})
    counts: Mapping[str, int] = MappingProxyType({})

    @abstractmethod
    def __call__(self, rollout: Rollout, samples: int, seed: int) -> list[Comparison]:
        """Return one comparison for each group of ``samples`` rows; omit groups without a preference.

        All random numbers derive from ``seed``. Callers add the cluster of the prompt from the rollout, and ``ended``
        if it is not set (see ``completed``).
        """

    def to(self, device: torch.device) -> None:
        """Move the weights to ``device``; by default those of ``rewards``."""
        for reward in self.rewards.values():
            reward.to(device)

    def open(self, folder: Path) -> None:  # noqa: B027
        """Open the data in ``folder`` that the annotator keeps across runs; by default it keeps none."""

    def rates(self, counts: Counter[str]) -> dict[str, float]:
        """Return metrics for a run's summary from the sum of ``counts`` over the run; none by default."""
        return {}


def completed(rollout: Rollout, comparisons: list[Comparison]) -> list[Comparison]:
    """Add what annotators need not set: the cluster of each prompt, and which responses were truncated.

    Annotators may mark truncated responses themselves. Of equal responses to one prompt, the first in the rollout is
    the first in the comparison.
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
