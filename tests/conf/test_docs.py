"""What is written about the plugins is true and whole: knobs, defaults, metrics, and a comment at every YAML key."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from rlhf import validation
from rlhf.annotators import GoldAnnotator
from rlhf.build import quiet
from rlhf.objective import ContrastObjective, CrossEntropy, LabelObjective, PairContext, PairLogps, PairObjective
from rlhf.rollout import Sampler
from rlhf.scoring import GoldReward
from rlhf_collect.stage import CollectStage
from rlhf_rejection_sampling.stage import RejectionSamplingStage
from tests.stages.conftest import adamw, constant, data, fit, folder, load  # noqa: F401  # fixtures
from tests.stages.test_exactness import STAGES, ppo

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/conf"))
FILES = sorted([*ROOT.glob("conf/**/*.yaml"), *ROOT.glob("plugins/*/conf/**/*.yaml")])
TELLING = ("_target_", "defaults")  # keys that need no comment: what is built, and from which options
COMPUTED = object()  # a default that other keys decide


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# -- comments -------------------------------------------------------------------------------------------------------


def uncommented(text: str) -> list[str]:
    """Lines of a YAML whose key is explained neither there nor above; keys that only hold others need no comment."""
    lines, found = text.splitlines(), []

    def walk(node: yaml.Node) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.value in TELLING:
                continue
            row = key.start_mark.line
            above = lines[row - 1].strip() if row else ""
            start = value.end_mark.column if value.end_mark.line == row else key.end_mark.column
            explained = "#" in lines[row][start:] or (above.startswith("#") and "@package" not in above)
            if not explained and not (isinstance(value, yaml.MappingNode) and not value.flow_style):
                found.append(f"line {row + 1}: {lines[row].strip()}")
            walk(value)

    walk(yaml.compose(text))
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_yaml_key_has_a_comment(path: Path) -> None:
    assert uncommented(path.read_text()) == []


def test_a_missing_comment_is_seen() -> None:
    text = "# @package _global_\na: 1\ndefaults: [b]\nc:\n  d: 2 # said\n  # said\n  e: 3\n  f: '#'\n  g: [1, 2]\n"
    assert uncommented(text) == ["line 2: a: 1", "line 8: f: '#'", "line 9: g: [1, 2]"]


# -- knobs ----------------------------------------------------------------------------------------------------------


def tables(readme: str) -> Iterator[list[str]]:
    """Rows of the Markdown tables as lists of cells."""
    for line in readme.splitlines():
        if line.startswith("|") and not line.startswith("|--"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def documented(readme: str) -> dict[tuple[str, str], str]:
    """(objective or "", key) -> the default that a README gives it."""
    found = {}
    for cells in tables(readme):
        at = next((i for i, cell in enumerate(cells[:2]) if re.fullmatch(r"`[a-z_]+\.[a-z_]+`", cell)), None)
        if at is not None and len(cells) > at + 1:
            found["" if at == 0 else cells[0].strip("`"), cells[at].strip("`")] = cells[at + 1]
    return found


def knobs(plugin: Path) -> Iterator[tuple[str, str, Any]]:
    """(objective or "", key as it is typed, default) of all that a plugin's stages and objectives can be told."""
    objectives = sorted(plugin.glob("conf/objective/*.yaml"))
    for path in objectives:
        node = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(node, dict)
        for knob in validation.parameters(get_object(node["_target_"])) or {}:
            yield (path.stem if len(objectives) > 1 else ""), f"objective.{knob}", node[knob]
    for path in sorted(plugin.glob("conf/stage/*.yaml")):
        node = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(node, dict)
        target = get_object(node["stage"].pop("_target_"))
        node["stage"].pop("name")
        missing = set(validation.parameters(target) or {}) - set(validation.groups(target)) - set(node["stage"])
        assert not missing, f"{name_of(path)} does not show {sorted(missing)}"
        for group, values in node.items():
            for knob, value in values.items() if isinstance(values, dict) else ():
                yield "", f"{group}.{knob}", COMPUTED if isinstance(value, str) and "${" in value else value


def same(cell: str, value: Any) -> bool:
    if value is COMPUTED:
        return bool(cell)
    read = yaml.safe_load(cell.strip("`"))
    return math.isclose(read, value) if isinstance(value, float) and isinstance(read, float) else read == value


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_every_knob_and_its_default_is_in_the_readme(plugin: Path) -> None:
    rows = documented((plugin / "README.md").read_text())
    wrong = []
    for option, key, value in knobs(plugin):
        cell = rows.get((option, key))
        label = f"`{key}`" + (f" of `{option}`" if option else "")
        if cell is None:
            wrong.append(f"{label} has no row in a table of knobs")
        elif not same(cell, value):
            wrong.append(f"{label}: the README says {cell}, the YAML {value}")
    assert not wrong, f"{plugin.name}/README.md:\n" + "\n".join(wrong)


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_a_readme_names_no_knob_that_is_not_there(plugin: Path, composed: Callable[..., DictConfig]) -> None:
    """Keys of other groups too: any `group.key` of a table is a key of some option of that group."""
    known = {key for _, key, _ in knobs(plugin)}
    for path in FILES:
        node = yaml.safe_load(path.read_text()) or {}
        if path.parent.parent.name == "conf" and "@package" not in path.read_text():
            known |= {f"{path.parent.name}.{key}" for key in node}
    shown = {key for _, key in documented((plugin / "README.md").read_text())}
    assert shown - known == set()


# -- metrics --------------------------------------------------------------------------------------------------------


def unexplained(plugin: str, metrics: Iterator[str] | set[str]) -> set[str]:
    """Metrics without a row in the README; a grade's name is written GRADE there."""
    cells = [cells[0] for cells in tables((ROOT / "plugins" / plugin / "README.md").read_text())]
    shown = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    grade = re.compile(r"/(negligible|slightly|better|significantly|tie)$")
    return {grade.sub("/GRADE", name) for name in metrics} - shown


@pytest.mark.parametrize("name", STAGES)
def test_every_metric_is_in_the_readme(name: str, load: Callable[..., Any], tmp_path: Path) -> None:  # noqa: F811
    stage = ppo(load, gamma=1.0) if name == "ppo" else STAGES[name](load)
    metrics = fit(stage, tmp_path, limit_train_batches=1, limit_val_batches=1)
    assert any(metric.startswith("val/") for metric in metrics)
    assert unexplained(f"rlhf_{name}", {*metrics, *stage.final_metrics()}) == set()


def test_every_metric_of_rejection_sampling_is_in_the_readme(load: Callable[..., Any], tmp_path: Path) -> None:  # noqa: F811
    parts = (load(), CrossEntropy(), data("prompt"), GoldReward(), Sampler(10, samples=2), adamw, constant)
    stage = RejectionSamplingStage(*parts, batch_size=8)
    metrics = fit(stage, tmp_path, limit_train_batches=1)
    assert unexplained("rlhf_rejection_sampling", {*metrics, *stage.final_metrics()}) == set()


def test_every_metric_of_collect_is_in_the_readme(load: Callable[..., Any], tmp_path: Path) -> None:  # noqa: F811
    stage = CollectStage(load(), data("prompt"), Sampler(10, samples=3), GoldAnnotator(noise=0.5), batch_size=16)
    stage.run_folder = tmp_path
    quiet()
    pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).predict(stage, return_predictions=False)
    assert unexplained("rlhf_collect", set(stage.final_metrics())) == set()


PAIRWISE = sorted(ROOT.glob("plugins/rlhf_dpo/conf/objective/*.yaml"))


@pytest.mark.parametrize("path", PAIRWISE, ids=lambda path: path.stem)
def test_every_metric_of_an_objective_is_in_the_readme(path: Path) -> None:
    objective = instantiate(OmegaConf.load(path))
    logps = PairLogps(-torch.ones(2), -torch.ones(2), torch.ones(2), torch.ones(2))
    if isinstance(objective, LabelObjective):
        _, metrics = objective(logps.chosen, logps.rejected, torch.tensor([True, False]), torch.tensor(0.0))
    elif isinstance(objective, ContrastObjective):
        _, metrics = objective(logps.chosen, logps.rejected, torch.tensor([True, False]), torch.eye(2))
    else:
        assert isinstance(objective, PairObjective)
        _, metrics = objective(logps, logps, PairContext(torch.ones(2), torch.zeros(2), torch.eye(2)))
    assert unexplained("rlhf_dpo", {name for metric in metrics for name in (metric, f"val/{metric}")}) == set()
