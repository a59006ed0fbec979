"""Pipelines over stages that compute nothing: the real pipeline YAMLs, fake stage YAMLs, a fake `build.train`."""

import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from rlhf.planning import step_config as configs
from rlhf.runs import source_code

PLUGIN = Path(__file__).parent / "plugin"
PIPELINES = Path(__file__).parents[2] / "conf" / "pipeline"


class FakeTrain:
    """Fake of `rlhf.running.build.train` that records its calls and writes the files that a stage would."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, bool]] = []
        self.configs: dict[str, DictConfig] = {}
        self.folders: dict[str, Path] = {}
        self.then: Callable[[str, Path], None] = lambda name, folder: None

    @property
    def order(self) -> list[str]:
        return [name for name, _ in self.calls]

    def __call__(self, config: DictConfig, folder: Path, resume: bool) -> dict[str, float]:
        name = config.stage.name
        self.calls.append((name, resume))
        self.configs[name], self.folders[name] = config, folder
        self.then(name, folder)
        (folder / "metrics.csv").write_text("step,loss\n1,0.5\n")
        if name == "collect":
            (folder / "comparisons.jsonl").write_text("{}\n")
        else:
            (folder / "model").mkdir(exist_ok=True)
            (folder / "model" / "config.json").write_text("{}")
        return {"val/loss": 0.25, "reward": 1.5, "headline": 0.25, "tokens_per_second": 100.0}


@pytest.fixture(autouse=True)
def _undrawn(undrawn: None) -> None:
    """Disable figures."""


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> FakeTrain:
    fake = FakeTrain()
    monkeypatch.setitem(sys.modules, "rlhf.running.build", SimpleNamespace(train=fake))
    return fake


class FakeCompare:
    """Fake of `rlhf.evaluation.compare.compare`."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self,
        before: Path,
        after: Path,
        prompts: Any,
        reward_model: Path | None = None,
        text: Any = None,
        *,
        count: int = 400,
        max_new_tokens: int = 32,
        temperature: float = 1.0,
        seed: int = 0,
        folder: Path | None = None,
        best_of: int = 1,
    ) -> Any:
        self.calls.append(
            {"before": before, "after": after, "reward_model": reward_model, "count": count, "seed": seed}
        )
        sample = SimpleNamespace(prompt="What is the colour of Mira?", before="red", after="It is red.")
        return SimpleNamespace(
            prompts=count,
            clusters=count,
            metrics=lambda: {"gold_difference": 0.2},
            table=lambda: [("gold reward", "0.50 ± 0.01", "0.70 ± 0.01", "+0.20 ± 0.01")],
            samples=[sample],
        )


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> FakeCompare:
    fake = FakeCompare()
    module = SimpleNamespace(compare=fake)
    monkeypatch.setitem(sys.modules, "rlhf.evaluation.compare", module)
    return fake


@pytest.fixture(scope="session")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a config tree of the fake stages and the real pipelines."""
    folder = tmp_path_factory.mktemp("fake") / "conf"
    shutil.copytree(PLUGIN / "rlhf_fake" / "conf", folder)
    shutil.copytree(PIPELINES, folder / "pipeline")
    return folder


@cache
def composed(conf: Path, overrides: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose("config", list(overrides))


code = cache(source_code._read)


@pytest.fixture
def typed(
    conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: FakeTrain, compared: FakeCompare
) -> Callable[..., DictConfig]:
    """Compose the config of a command line, in an empty working directory."""
    monkeypatch.syspath_prepend(str(PLUGIN))
    monkeypatch.chdir(tmp_path)
    configs.register_resolvers()
    # The code does not change within a test session.
    monkeypatch.setattr(source_code, "_read", code)
    return lambda *overrides: composed(conf, overrides).copy()
