"""Docs of the plugins are true and complete: hyperparameters, defaults, metrics, and a comment at every YAML key."""

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

from rlhf.annotator.gold import GoldAnnotator
from rlhf.console import silence_libraries
from rlhf.objective import ContrastObjective, CrossEntropy, LabelObjective, PairContext, PairLogps, PairObjective
from rlhf.reward.gold import GoldReward
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.signatures import groups, parameters
from rlhf_collect.stage import CollectStage
from rlhf_rejection_sampling.stage import RejectionSamplingStage
from tests.stages.conftest import adamw, constant, data, fit, folder, load  # noqa: F401  # fixtures
from tests.stages.test_exactness import STAGES, ppo

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/conf"))
FILES = sorted([*ROOT.glob("conf/**/*.yaml"), *ROOT.glob("plugins/*/conf/**/*.yaml")])
EXEMPT = ("_target_", "defaults")  # keys that need no comment: the class, and the options that it uses
COMPUTED = object()  # a default that is computed from other keys
BY_RECIPE = re.compile(r"\$\{(recipe|peak_lr):([^{}]*)\}")  # a default that depends on the recipe


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# -- comments -------------------------------------------------------------------------------------------------------


def uncommented(text: str) -> list[str]:
    """Return YAML lines whose key has no comment beside or above it; keys that only contain others need none."""
    lines, found = text.splitlines(), []

    def walk(node: yaml.Node) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.value in EXEMPT:
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


def test_a_missing_comment_is_detected() -> None:
    text = "# @package _global_\na: 1\ndefaults: [b]\nc:\n  d: 2 # said\n  # said\n  e: 3\n  f: '#'\n  g: [1, 2]\n"
    assert uncommented(text) == ["line 2: a: 1", "line 8: f: '#'", "line 9: g: [1, 2]"]


# -- hyperparameters --------------------------------------------------------------------------------------------------


def tables(readme: str) -> Iterator[list[str]]:
    """Yield rows of the Markdown tables as lists of cells."""
    for line in readme.splitlines():
        if line.startswith("|") and not line.startswith("|--"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def documented(readme: str) -> dict[tuple[str, str], str]:
    """Return (objective or "", key) -> default as a README documents it."""
    found = {}
    for cells in tables(readme):
        at = next((i for i, cell in enumerate(cells[:2]) if re.fullmatch(r"`[a-z_]+\.[a-z_]+`", cell)), None)
        if at is not None and len(cells) > at + 1:
            found["" if at == 0 else cells[0].strip("`"), cells[at].strip("`")] = cells[at + 1]
    return found


def hyperparameters(plugin: Path) -> Iterator[tuple[str, str, Any]]:
    """Yield (objective or "", key as it is typed, default) of every hyperparameter of a plugin."""
    objectives = sorted(plugin.glob("conf/objective/*.yaml"))
    for path in objectives:
        node = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(node, dict)
        for hyperparameter in parameters(get_object(node["_target_"])) or {}:
            yield (path.stem if len(objectives) > 1 else ""), f"objective.{hyperparameter}", node[hyperparameter]
    for path in sorted(plugin.glob("conf/stage/*.yaml")):
        node = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(node, dict)
        if "_target_" not in node.get("stage", {}):  # a variant of a stage
            continue
        target = get_object(node["stage"].pop("_target_"))
        node["stage"].pop("name")
        missing = set(parameters(target) or {}) - set(groups(target)) - set(node["stage"])
        assert not missing, f"{name_of(path)} does not show {sorted(missing)}"
        for group, values in node.items():
            for hyperparameter, value in values.items() if isinstance(values, dict) else ():
                computed = isinstance(value, str) and "${" in value and not BY_RECIPE.fullmatch(value)
                yield "", f"{group}.{hyperparameter}", COMPUTED if computed else value


def same(cell: str, value: Any) -> bool:
    if value is COMPUTED:
        return bool(cell)
    if isinstance(value, str) and (by_recipe := BY_RECIPE.fullmatch(value)):
        labels = ("", "testbed ") if by_recipe[1] == "recipe" else ("", "adapter ", "testbed ")
        shown, values = cell.split("; "), by_recipe[2].split(",")
        return len(shown) == len(values) == len(labels) and all(
            one.startswith(label) and number(one.removeprefix(label)) == number(wanted)
            for one, label, wanted in zip(shown, labels, values, strict=True)
        )
    read = yaml.safe_load(cell.strip("`"))
    return math.isclose(read, value) if isinstance(value, float) and isinstance(read, float) else read == value


def number(text: str) -> float | None:
    return None if text == "null" else float(text)


def test_a_default_of_each_recipe_is_compared_with_its_own_value() -> None:
    assert same("64; testbed 32", "${recipe:64,32}") and same("8; testbed null", "${recipe:8,null}")
    assert same("2e-5; adapter 2e-4; testbed 1.5e-3", "${peak_lr:2.0e-5,2.0e-4,1.5e-3}")
    for cell in ("64", "64; testbed 64", "32; testbed 64", "64; adapter 32"):
        assert not same(cell, "${recipe:64,32}")


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_every_hyperparameter_and_its_default_is_in_the_readme(plugin: Path) -> None:
    rows = documented((plugin / "README.md").read_text())
    wrong = []
    for option, key, value in hyperparameters(plugin):
        cell = rows.get((option, key))
        label = f"`{key}`" + (f" of `{option}`" if option else "")
        if cell is None:
            wrong.append(f"{label} has no row in a table of hyperparameters")
        elif not same(cell, value):
            wrong.append(f"{label}: the README says {cell}, the YAML {value}")
    assert not wrong, f"{plugin.name}/README.md:\n" + "\n".join(wrong)


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_a_readme_names_only_existing_hyperparameters(plugin: Path, composed: Callable[..., DictConfig]) -> None:
    """Keys of other groups too: any `group.key` of a table is a key of some option of that group."""
    known = {key for _, key, _ in hyperparameters(plugin)}
    for path in FILES:
        node = yaml.safe_load(path.read_text()) or {}
        if path.parent.parent.name == "conf" and "@package" not in path.read_text():
            known |= {f"{path.parent.name}.{key}" for key in node}
    shown = {key for _, key in documented((plugin / "README.md").read_text())}
    assert shown - known == set()


# -- metrics --------------------------------------------------------------------------------------------------------


def unexplained(plugin: str, metrics: Iterator[str] | set[str]) -> set[str]:
    """Return metrics without a row in the README; a grade's name is written GRADE there."""
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
    parts = (load(), CrossEntropy(), data("prompt"), GoldReward(), AncestralSampler(10, samples=2), adamw, constant)
    stage = RejectionSamplingStage(*parts, batch_size=8)
    metrics = fit(stage, tmp_path, limit_train_batches=1)
    assert unexplained("rlhf_rejection_sampling", {*metrics, *stage.final_metrics()}) == set()


def test_every_metric_of_collect_is_in_the_readme(load: Callable[..., Any], tmp_path: Path) -> None:  # noqa: F811
    stage = CollectStage(
        load(), data("prompt"), AncestralSampler(10, samples=3), GoldAnnotator(noise=0.5), batch_size=16
    )
    stage.run_directory = tmp_path
    silence_libraries()
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
