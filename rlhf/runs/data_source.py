"""Interface of data, as runs see it: a digest that names the content, and a load."""

from abc import ABC, abstractmethod
from typing import Any


class DataSource(ABC):
    """Base class of data: built without reading them, named by their content, loaded when a step begins."""

    @abstractmethod
    def digest(self) -> str:
        """Return a digest of the content, which is part of the fingerprint of every run that reads it."""

    @abstractmethod
    def load(self) -> Any:
        """Return the records, split into training and validation."""


def is_data(target: Any) -> bool:
    """Return whether a ``_target_`` is a class of data."""
    return isinstance(target, type) and issubclass(target, DataSource)
