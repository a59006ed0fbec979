"""Context of a check, and the exceptions by which a check ends otherwise than passed. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """Settings that a check receives.

    Attributes:
        device: cuda or cpu.
        small: Whether to run tiny models, to prove that the check runs.
        folder: Empty directory for what the check writes.
    """

    device: str
    small: bool
    folder: Path

    @property
    def trainer(self) -> str:
        """Option of the config group ``trainer``."""
        return "gpu" if self.device == "cuda" else "cpu"

    @property
    def dtype(self) -> str:
        """Arithmetic of speed checks: bf16, on a CPU fp32, as many CPUs multiply bf16 a hundred times slower."""
        return "bf16" if self.device == "cuda" else "fp32"


class Ended(Exception):
    """End of a check that did not pass.

    Args:
        reason: One sentence.
        figures: What was measured before.
    """

    status = ""

    def __init__(self, reason: str, figures: Mapping[str, Any] | None = None) -> None:
        super().__init__(reason)
        self.figures: Figures = dict(figures or {})


class Failed(Ended):
    """A figure is beyond its tolerance."""

    status = "failed"


class Refused(Ended):
    """The framework does not offer what was asked for."""

    status = "refused"


class Skipped(Ended):
    """A package or a device that the check needs is absent."""

    status = "skipped"
