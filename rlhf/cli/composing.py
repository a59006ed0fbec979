"""Compose the config of a command once. Hydra composes it twice: first for its mode, single run or sweep."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.types import RunMode
from omegaconf import DictConfig


@contextmanager
def composed_once() -> Iterator[None]:
    """Context manager: a single run uses the config that Hydra composed to find out that it is one.

    For commands without ``--multirun``. What the config itself makes a sweep, and what cannot be composed, is left to
    Hydra, which composes again.
    """
    Hydra.get_mode = _mode  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_mode = _hydras_mode  # type: ignore[method-assign]


_hydras_mode = Hydra.get_mode


def _mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    """Return the mode that the config sets; keep the config for the run that follows if it sets none."""
    loader: Any = self.config_loader
    try:
        config = loader.load_configuration(config_name, overrides, RunMode.RUN)
        mode = config.hydra.mode
    except Exception:  # which Hydra raises again where it composes for the run
        return _hydras_mode(self, config_name, overrides)
    if mode is None:

        def composed(*_: Any, **__: Any) -> DictConfig:
            del loader.load_configuration  # this once
            # What Hydra adds to the overrides of a run whose config sets no mode.
            config.hydra.mode = RunMode.RUN
            config.hydra.overrides.hydra.append("hydra.mode=RUN")
            return config

        loader.load_configuration = composed
    return mode
