"""A single run is composed once, to exactly the config that Hydra composes in two passes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from rlhf import discovery
from rlhf.cli import composing, main
from rlhf.running import pipeline

Typed = Callable[[str], tuple[int, int, list[Any]]]


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Typed:
    """Return a function: line -> exit status, number of compositions, and the configs that ran with Hydra's own."""
    monkeypatch.chdir(tmp_path)
    count: list[None] = []
    found: list[Any] = []
    load = ConfigLoaderImpl._load_configuration_impl

    def counted(*args: Any, **kwargs: Any) -> DictConfig:
        count.append(None)
        return load(*args, **kwargs)

    def run(config: DictConfig) -> None:
        of_hydra = OmegaConf.to_container(HydraConfig.get())
        found.append((OmegaConf.to_container(config), of_hydra, OmegaConf.is_struct(config)))

    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", counted)
    monkeypatch.setattr(pipeline, "run", run)

    def type_it(line: str) -> tuple[int, int, list[Any]]:
        count.clear()
        found.clear()
        return main.run(line.split()), len(count), list(found)

    return type_it


@pytest.mark.parametrize("line", ["stage=dpo objective.beta=0.2", "stage=sft hydra.verbose=false hydra.job.name=mine"])
def test_one_composition_equals_the_two_of_hydra(typed: Typed, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    def by_hydra(task: Any, words: list[str]) -> None:
        hydra.main(version_base="1.3", config_path=str(discovery.conf_dir()), config_name="config")(task)()

    once = typed(line)
    monkeypatch.setattr(composing, "run_composed_once", by_hydra)
    twice = typed(line)
    assert (once[0], once[1]) == (0, 1) and (twice[0], twice[1]) == (0, 2)
    assert once[2] == twice[2] and len(once[2]) == 1
    assert once[2][0][1]["overrides"]["hydra"][-1] == "hydra.mode=RUN"


@pytest.mark.parametrize(
    "word, compositions",  # a wrong option composes the stage alone once more, for the options that fit it
    [("objective.beat=0.2", 1), ("objective.beta=[0.1", 1), ("objective=nonsense", 2)],
)
def test_a_mistake_is_composed_once(
    typed: Typed, capsys: pytest.CaptureFixture[str], word: str, compositions: int
) -> None:
    assert typed(f"stage=dpo {word}") == (2, compositions, [])
    assert word.partition("=")[0] in capsys.readouterr().err


def test_a_configured_mode_and_a_mistake_are_passed_on_to_hydra(
    typed: Typed, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, found = typed("stage=dpo objective.beta=0.1,0.2 hydra.mode=MULTIRUN hydra/launcher=basic")
    assert status == 0 and [config["objective"]["beta"] for config, _, _ in found] == [0.1, 0.2]
    capsys.readouterr()
    assert typed("stage=dpo objective.beta=0.1,0.2")[0] == 2
    assert "objective.beta=0.1,0.2: several values are a sweep; add -m" in capsys.readouterr().err
