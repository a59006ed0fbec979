"""Ranking loss of a reward model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rlhf.objective import Metrics, ScoreObjective, require_same_shape, win_rate

Grade = Literal["negligible", "slightly", "better", "significantly"]
GRADES: tuple[Grade, ...] = ("negligible", "slightly", "better", "significantly")  # the index order of `grade`

# Llama 2 (arXiv 2307.09288), Table 27.
MARGINS: dict[str, dict[Grade, float]] = {
    "none": {},
    "small": {"negligible": 0.0, "slightly": 1 / 3, "better": 2 / 3, "significantly": 1.0},
    "large": {"negligible": 0.0, "slightly": 1.0, "better": 2.0, "significantly": 3.0},
}


@dataclass(frozen=True)
class Pairwise(ScoreObjective):
    """Pairwise ranking loss: `-log sigmoid(r_c - r_r - m(grade)) + centering * (r_c + r_r)^2`.

    InstructGPT (arXiv 2203.02155, eq. 1) with the margin of Llama 2 (arXiv 2307.09288, eq. 2) and the centering term of
    Eisenstein et al. 2023 (arXiv 2312.09244). `margin` is a named table or a custom one by grade; a grade that the
    table lacks, and a pair of unknown grade, have margin 0.
    """

    margin: Literal["none", "small", "large"] | dict[Grade, Annotated[float, Field(ge=0)]] = "none"
    centering: Annotated[float, Field(ge=0)] = 0.0

    @property
    def margins(self) -> tuple[float, ...]:
        """Margin of each grade, in the order of GRADES."""
        table: Mapping[Grade, float] = MARGINS[self.margin] if isinstance(self.margin, str) else self.margin
        return tuple(float(table.get(grade, 0.0)) for grade in GRADES)

    @property
    def needs_grades(self) -> bool:
        """Return whether any margin is not 0."""
        return any(self.margins)

    def __call__(self, chosen: Tensor, rejected: Tensor, grade: Tensor) -> tuple[Tensor, Metrics]:
        """Return the losses [P] and metrics [P] from scores [P].

        Raises:
            ValueError: The shapes differ.
        """
        require_same_shape(chosen=chosen, rejected=rejected, grade=grade)
        gap = chosen.float() - rejected.float()
        # The last entry is the margin of grade -1 (unknown).
        margin = torch.tensor((*self.margins, 0.0), device=gap.device)[grade]
        losses = -F.logsigmoid(gap - margin)
        if self.centering:
            losses = losses + self.centering * (chosen.float() + rejected.float()).square()
        metrics = {
            "accuracy": win_rate(chosen, rejected),
            "ranking_loss": -F.logsigmoid(gap),  # without margin and centering: comparable across a sweep of them
            "gap": gap,
            "margin": margin,
            "chosen_score": chosen,
            "rejected_score": rejected,
        }
        return losses, {name: value.detach() for name, value in metrics.items()}
