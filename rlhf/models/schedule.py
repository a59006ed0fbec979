"""Learning-rate schedules: the factor on the learning rate as a function of the step.

Steps are optimizer steps, or rollout steps in stages that sample.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Constant:
    """Constant factor of 1 after a linear warmup.

    Args:
        warmup: Fraction of all steps over which the factor rises linearly to 1.
        min_warmup: Minimum number of warmup steps if there is a warmup, but at most half the run. A fraction of a short
            run is less than two steps, which is no warmup at all (Llama 2, arXiv 2307.09288, section 3.2.2: 3% of all,
            with a minimum of 5).
    """

    warmup: Fraction = 0.0
    min_warmup: Annotated[int, Field(ge=0)] = field(default=5, kw_only=True)

    def __call__(self, step: int, total: int) -> float:
        """Return the factor at step ``step`` (from 0) of ``total``, in (0, 1]."""
        rise = 0
        if self.warmup:
            rise = max(round(self.warmup * total), min(self.min_warmup, max(2, total // 2)))
        if step < rise:
            return (step + 1) / rise  # a factor of 0 would waste the first step
        return self.decay(min(1.0, (step - rise) / max(1, total - rise)))

    def decay(self, progress: float) -> float:
        """Return the factor after warmup, with ``progress`` from 0 to 1."""
        return 1.0


@dataclass(frozen=True)
class Linear(Constant):
    """Linear decay from 1 to ``minimum``.

    Args:
        minimum: Factor at the end of the decay.
    """

    minimum: Fraction = 0.0

    def decay(self, progress: float) -> float:
        """Return 1 - (1 - minimum) * progress."""
        return 1.0 - (1.0 - self.minimum) * progress


@dataclass(frozen=True)
class Cosine(Constant):
    """Decay along half a cosine from 1 to ``minimum`` (Loshchilov & Hutter 2016, eq. 5).

    Args:
        minimum: Factor at the end of the decay; InstructGPT and Llama 2 use 0.1.
    """

    warmup: Fraction = 0.03
    minimum: Fraction = 0.1

    def decay(self, progress: float) -> float:
        """Return minimum + (1 - minimum) * (1 + cos(pi * progress)) / 2."""
        return self.minimum + (1.0 - self.minimum) * (1.0 + math.cos(math.pi * progress)) / 2.0
