"""Start of a single run with one composition of its config; `hydra.main` composes it twice, first to find its mode."""

from collections.abc import Sequence
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode, TaskFunction
from omegaconf import DictConfig

from rlhf import discovery


def run_composed_once(task: TaskFunction, overrides: Sequence[str]) -> None:
    """Compose the config of a command without flags and call ``task`` with it, as `hydra.main` does.

    Args:
        task: Function of the composed config.
        overrides: The words of the command. A config that makes itself a sweep starts one.
    """
    words = list(overrides)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(discovery.conf_dir()), job_name="main", version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        loader: Any = hydra.config_loader
        try:
            config = loader.load_configuration("config", words, RunMode.RUN)
            mode = config.hydra.mode
        except HydraException:
            if not _has_sweep_values(words):
                raise
            config, mode = None, hydra.get_mode("config", words)  # they are valid if the config makes itself a sweep
        if mode is None:
            words.append("hydra.mode=RUN")
            if config is not None:  # Hydra makes the same additions for a run whose config sets no mode
                config.hydra.mode = RunMode.RUN
                config.hydra.overrides.hydra.append("hydra.mode=RUN")
        if mode == RunMode.MULTIRUN:
            hydra.multirun("config", task, words)
        else:
            if config is not None:
                hydra.config_loader = _Composed(loader, config)  # type: ignore[assignment]
            hydra.run("config", task, words)


def _has_sweep_values(words: Sequence[str]) -> bool:
    """Return whether a word gives its key several values; raise Hydra's error if a word is not in its grammar."""
    return any(override.is_sweep_override() for override in OverridesParser.create().parse_overrides(list(words)))


class _Composed:
    """Config loader that returns a composed config, and is the loader it wraps in everything else."""

    def __init__(self, loader: Any, config: DictConfig) -> None:
        self._loader, self._config = loader, config

    def load_configuration(self, *_: Any, **__: Any) -> DictConfig:
        return self._config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
