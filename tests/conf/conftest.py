"""Fixture that composes configs as the command does."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from rlhf import discovery
from rlhf.cli.main import register

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def composed() -> Iterator[Callable[..., DictConfig]]:
    """Return compose(*overrides) -> config, with the plugins on Hydra's search path."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(discovery.conf_dir()), version_base="1.3"):
        yield lambda *overrides: compose("config", overrides=list(overrides))
