"""Objective of a third party."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from rlhf.objective import Metrics, PairContext, PairLogps, PairObjective


@dataclass(frozen=True)
class Cubic(PairObjective):
    """Loss `relu(target - delta)^3` with `delta` the difference of the two log-ratios."""

    target: Annotated[float, Field(gt=0)] = 2.0

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return losses [P]."""
        assert reference is not None
        delta = (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)
        return (self.target - delta).clamp(min=0) ** 3, {"delta": delta.detach()}
