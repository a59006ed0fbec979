"""Part of an objective: importance weights against a sampler that is not the policy itself."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from rlhf.errors import UserError, key
from rlhf.functional.sampler_mismatch import TRUNCATES, SamplerCorrection, correction_weights
from rlhf.objective import PolicyGradientObjective

__all__ = ["CorrectsSampler"]


@dataclass(frozen=True, kw_only=True)
class CorrectsSampler(PolicyGradientObjective):
    """Hyperparameters of the importance weights that correct a sampler which is not the policy itself.

    In fp32 with the policy's own sampler there is nothing to correct, and they have no effect.
    """

    sampler_correction: SamplerCorrection = "none"
    correction_max: Annotated[float, Field(gt=0)] | None = 3.0
    correction_min: Annotated[float, Field(gt=0)] | None = None

    def __post_init__(self) -> None:
        low, high = self.correction_min, self.correction_max
        if self.sampler_correction in TRUNCATES and low is None and high is None:
            raise UserError(
                "truncates importance ratios, and they have no bound",
                fix=f"type {key('objective.correction_max', 3)}",
                option="objective.sampler_correction",
                value=self.sampler_correction,
            )
        if low is not None and high is not None and low >= high:
            raise UserError(
                f"must be below {key('objective.correction_max', high)}",
                fix=f"type {key('objective.correction_min', high / 2)}",
                option="objective.correction_min",
                value=low,
            )

    def sampler_weights(self, old_logp: Tensor, sampler_logp: Tensor, mask: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the weights and where a bound changed them, as `correction_weights`; None without correction."""
        if self.sampler_correction == "none":
            return None
        low, high = self.correction_min, self.correction_max
        return correction_weights(old_logp, sampler_logp, mask, self.sampler_correction, low, high)
