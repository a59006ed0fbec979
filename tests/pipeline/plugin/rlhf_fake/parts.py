from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from rlhf.runs.data_source import DataSource


class Objective:
    """Base of the fake objectives."""


@dataclass(frozen=True)
class Loss(Objective):
    """Loss with a coefficient."""

    beta: Annotated[float, Field(gt=0)] = 0.1


class IPO(Loss):
    """Another loss with the same coefficient."""


class Model:
    def __init__(self, path: str | None = None, architecture: dict | None = None) -> None: ...


class Adapter:
    """No adapter."""


class LoRA:
    def __init__(self, rank: int = 8) -> None: ...


class Optimizer:
    def __init__(self, lr: Annotated[float, Field(gt=0)] = 1e-3) -> None: ...


class Trainer:
    def __init__(self, devices: int = 1) -> None: ...


class Reward:
    """Gold reward."""


class ModelReward:
    def __init__(self, path: str) -> None: ...


class GatedReward(Reward):
    def __init__(self, helpfulness: str, safety: str) -> None: ...


class Annotator:
    def __init__(self, aspect: str = "gold") -> None: ...


class Sampler:
    def __init__(self, temperature: float = 1.0) -> None: ...


class Data(DataSource):
    """Data with a digest that counts how often it is computed."""

    def __init__(self, record: str = "text", source: str | list[str] = "testbed") -> None:
        self.record, self.source = record, source

    def digest(self) -> str:
        return f"{self.record}:{self.source}"

    def load(self) -> None: ...
