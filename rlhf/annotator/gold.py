"""Gold annotator: the testbed's labeller with simulated human error."""

import random
from typing import Annotated

from pydantic import Field

from rlhf.annotator.base import Annotator
from rlhf.data.records import Comparison
from rlhf.data.testbed.world import Aspect, label_responses
from rlhf.sampler.rollout import Rollout


class GoldAnnotator(Annotator):
    """Testbed labeller with simulated human error.

    Args:
        noise: Standard deviation of the error on each judged score, in units of the gold score.
        aspect: Judged aspect: "total" (safety of responses to unsafe prompts, helpfulness of the others), or
            "helpfulness" or "safety" alone, for two reward models as in Llama 2.
    """

    def __init__(self, noise: Annotated[float, Field(ge=0)] = 0.05, aspect: Aspect = "total") -> None:
        self.noise, self.aspect = noise, aspect

    def __call__(self, rollout: Rollout, samples: int, seed: int) -> list[Comparison]:
        """Return comparisons graded by gaps of the noisy gold score."""
        rng = random.Random(seed)
        made = []
        for start in range(0, len(rollout.texts), samples):
            group, ended = slice(start, start + samples), rollout.ended[start : start + samples].tolist()
            made.append(
                label_responses(rollout.prompts[start], rollout.texts[group], rng, self.noise, self.aspect, ended)
            )
        return [comparison for comparison in made if comparison.pairs()]
