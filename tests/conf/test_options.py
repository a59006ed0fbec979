"""Every YAML of conf/ and plugins/*/conf: commented, bound to its constructor, equal to its defaults, composable."""

import inspect
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from rlhf.planning.option_files import defaults_compared, foreign_keys, nodes, unexplained_keys
from rlhf.planning.validation.config import validate_config
from rlhf.planning.validation.objective import annotated_classes, objective_options
from rlhf.planning.validation.stage import SHARED_GROUPS
from rlhf.signatures import groups, parameters
from rlhf.testing import ROLES

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*ROOT.glob("conf/**/*.yaml"), *ROOT.glob("plugins/*/conf/**/*.yaml")])
IDS = [str(path.relative_to(ROOT)) for path in FILES]


def group_of(path: Path) -> str:
    return path.parent.relative_to(next(p for p in path.parents if p.name == "conf")).as_posix()


def test_all_files_are_covered() -> None:
    assert len(FILES) > 50
    assert {p.parents[len(p.relative_to(ROOT).parts) - 3].name for p in FILES if "plugins" in p.parts} >= {
        "rlhf_collect",
        "rlhf_dpo",
        "rlhf_ppo",
        "rlhf_pretrain",
        "rlhf_rejection_sampling",
        "rlhf_reward_model",
        "rlhf_sft",
    }


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_every_key_has_a_comment(path: Path) -> None:
    assert any(x.startswith("#") and "@package" not in x for x in path.read_text().splitlines()[:3]), "what is it?"
    assert unexplained_keys(path) == []


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_keys_are_parameters_of_the_constructor(path: Path) -> None:
    assert foreign_keys(path) == []


def test_every_hyperparameter_is_shown_in_some_yaml() -> None:
    """A hyperparameter that no YAML shows cannot be found by reading the configs."""
    shown: dict[str, set[str]] = defaultdict(set)
    hyperparameters: dict[str, set[str]] = {}
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for path in FILES:
        for where, node, target in nodes(path):
            name = node["_target_"]
            if not name.startswith("rlhf") or node.get("_partial_"):
                continue
            given = groups(target) if where == "stage" else ()
            hyperparameters[name] = {n for n, p in (parameters(target) or {}).items() if p.kind in kinds} - set(given)
            shown[name] |= set(node) | _in_defaults(path)
    assert {name: missing for name in hyperparameters if (missing := hyperparameters[name] - shown[name])} == {}


def _in_defaults(path: Path) -> set[str]:
    """Return keys that other options of the defaults list fill in, as in `/reward@reward: model`."""
    found = set()
    for entry in OmegaConf.load(path).get("defaults") or []:
        for key in entry if isinstance(entry, DictConfig) else [entry]:
            base = path.parent / f"{key}.yaml"
            if "@" in str(key):
                found.add(str(key).split("@")[1].split(".")[0])
            elif base.exists():
                found |= {str(k) for k in OmegaConf.load(base)} | _in_defaults(base)
    return found


def test_defaults_of_yaml_and_constructor_agree() -> None:
    """Where a constructor has a default, the YAML must have the same value.

    A constructor that several options share (the sizes of one model class) may differ from all but one of them.
    """
    seen: dict[tuple[str, str], dict[str, Any]] = defaultdict(dict)
    for path in FILES:
        for target, name, same, value, default in defaults_compared(path):
            if target.startswith("rlhf"):
                seen[target, name][str(path.relative_to(ROOT))] = (same, value, default)
    wrong = [
        f"{target}: {name} is {values}"
        for (target, name), values in seen.items()
        if not any(same for same, _, _ in values.values())
    ]
    assert not wrong, "\n".join(wrong)


def options(group: str) -> list[str]:
    return sorted({path.stem for path in FILES if group_of(path) == group})


@pytest.mark.parametrize("stage", options("stage"))
def test_every_stage_passes_validation_with_its_defaults(composed: Callable[..., DictConfig], stage: str) -> None:
    roles = ("policy", "reward_model", "safety_model", "comparisons", "demonstrations")
    config = composed(f"stage={stage}", *(f"inputs.{role}=given" for role in roles))
    validate_config(config)


@pytest.mark.parametrize("group", [g for g in SHARED_GROUPS if g != "callbacks"])
def test_every_option_of_the_shared_groups_passes_validation(composed: Callable[..., DictConfig], group: str) -> None:
    assert options(group)
    for option in options(group):
        config = composed("stage=sft", f"{group}={option}")
        try:
            validate_config(config)
        except Exception as e:
            pytest.fail(f"{group}={option}: {e}")


def test_every_objective_fits_a_stage(composed: Callable[..., DictConfig]) -> None:
    given = [f"inputs.{role}=given" for role in ROLES]
    register = {stage: composed(f"stage={stage}", *given) for stage in options("stage")}
    taking = {stage: get_object(c.stage._target_) for stage, c in register.items() if "objective" in c}
    files = {path.stem: path for path in FILES if group_of(path) == "objective"}
    for option in options("objective"):
        target = next(get_object(t) for o, t in objective_options() if o == option)
        fits = [
            stage
            for stage, made in taking.items()
            if issubclass(target, annotated_classes(groups(made)["objective"].annotation))
        ]
        assert fits, f"no stage takes objective={option}"
        config = register[fits[0]].copy()
        config.objective = OmegaConf.load(files[option])  # options without a defaults list, which Hydra would follow
        assert "defaults" not in config.objective
        validate_config(config)


@pytest.mark.parametrize("group", ["experiment", "debug", "sweep", "pipeline"])
def test_every_named_set_composes(composed: Callable[..., DictConfig], group: str) -> None:
    assert options(group)
    for option in options(group):
        extra = ["stage=dpo"] if group in ("debug", "sweep") else []
        composed(*extra, f"{group}={option}")
