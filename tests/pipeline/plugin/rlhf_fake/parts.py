from dataclasses import dataclass
from typing import Annotated

from pydantic import Field


class Objective:
    """Base of the fake objectives."""


@dataclass(frozen=True)
class Loss(Objective):
    """Any loss with a coefficient."""

    beta: Annotated[float, Field(gt=0)] = 0.1


class IPO(Loss):
    """Another loss with the same coefficient."""


class Model:
    def __init__(self, path: str | None = None, architecture: dict | None = None) -> None: ...


class Adapter:
    """None at all."""


class LoRA:
    def __init__(self, rank: int = 8) -> None: ...


class Optimizer:
    def __init__(self, lr: Annotated[float, Field(gt=0)] = 1e-3) -> None: ...


class Trainer:
    def __init__(self, devices: int = 1) -> None: ...


class Reward:
    """Knows the truth."""


class ModelReward:
    def __init__(self, path: str) -> None: ...


class GatedReward(Reward):
    def __init__(self, helpfulness: str, safety: str) -> None: ...


class Annotator:
    def __init__(self, aspect: str = "gold") -> None: ...


class Sampler:
    def __init__(self, temperature: float = 1.0) -> None: ...


class Data:
    """Data with a digest: counts how often it was asked for."""

    def __init__(self, record: str = "text", source: str | list[str] = "testbed") -> None:
        self.record, self.source = record, source

    def digest(self) -> str:
        return f"{self.record}:{self.source}"
