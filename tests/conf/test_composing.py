"""A single run is composed once, to the very config that Hydra composes in two goes."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from rlhf import pipeline
from rlhf.cli import composing, main

Typed = Callable[[str], tuple[int, int, list[Any]]]


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Typed:
    """typed(line) -> exit status, how often a config was composed, the configs that were run with Hydra's own."""
    monkeypatch.chdir(tmp_path)
    count: list[None] = []
    found: list[Any] = []
    load = ConfigLoaderImpl._load_configuration_impl

    def counted(*args: Any, **kwargs: Any) -> DictConfig:
        count.append(None)
        return load(*args, **kwargs)

    def run(config: DictConfig) -> None:
        hydra = OmegaConf.to_container(HydraConfig.get())
        found.append((OmegaConf.to_container(config), hydra, OmegaConf.is_struct(config)))

    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", counted)
    monkeypatch.setattr(pipeline, "run", run)

    def type_it(line: str) -> tuple[int, int, list[Any]]:
        count.clear()
        found.clear()
        return main.run(line.split()), len(count), list(found)

    return type_it


@pytest.mark.parametrize("line", ["stage=dpo objective.beta=0.2", "stage=sft hydra.verbose=false hydra.job.name=mine"])
def test_the_config_is_the_one_that_hydra_composes_in_two_goes(
    typed: Typed, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    once = typed(line)
    monkeypatch.setattr(composing, "composed_once", nullcontext)
    twice = typed(line)
    assert (once[0], once[1]) == (0, 1) and (twice[0], twice[1]) == (0, 2)
    assert once[2] == twice[2] and len(once[2]) == 1
    assert once[2][0][1]["overrides"]["hydra"][-1] == "hydra.mode=RUN"


def test_a_mode_that_the_config_sets_and_a_mistake_are_left_to_hydra(
    typed: Typed, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, found = typed("stage=dpo objective.beta=0.1,0.2 hydra.mode=MULTIRUN hydra/launcher=basic")
    assert status == 0 and [config["objective"]["beta"] for config, _, _ in found] == [0.1, 0.2]
    capsys.readouterr()
    assert typed("stage=dpo objective.beta=0.1,0.2")[0] == 2
    assert "objective.beta=0.1,0.2: several values are a sweep; add -m" in capsys.readouterr().err
