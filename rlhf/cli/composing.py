"""Patch that composes the config of a command once; Hydra composes it twice, first to find its mode."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.types import RunMode
from omegaconf import DictConfig


@contextmanager
def composed_once() -> Iterator[None]:
    """Context manager: a single run reuses the config that Hydra composed to find the mode.

    For commands without ``--multirun``. A config that makes itself a sweep, or that cannot be composed, is left to
    Hydra, which composes it again.
    """
    Hydra.get_mode = _mode  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_mode = _hydras_mode  # type: ignore[method-assign]


_hydras_mode = Hydra.get_mode


def _mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    """Return the mode that the config sets; if it sets none, keep the config for the run that follows."""
    loader: Any = self.config_loader
    try:
        config = loader.load_configuration(config_name, overrides, RunMode.RUN)
        mode = config.hydra.mode
    except Exception:  # Hydra raises it again when it composes for the run
        return _hydras_mode(self, config_name, overrides)
    if mode is None:

        def composed(*_: Any, **__: Any) -> DictConfig:
            del loader.load_configuration  # restores the method after one use
            # Hydra makes the same additions for a run whose config sets no mode.
            config.hydra.mode = RunMode.RUN
            config.hydra.overrides.hydra.append("hydra.mode=RUN")
            return config

        loader.load_configuration = composed
    return mode
