"""Every YAML of conf/ and plugins/*/conf: commented, bound to its constructor, equal to its defaults, composable."""

import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from rlhf import validation
from rlhf.config import leaves, targets

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*ROOT.glob("conf/**/*.yaml"), *ROOT.glob("plugins/*/conf/**/*.yaml")])
IDS = [str(path.relative_to(ROOT)) for path in FILES]


def group_of(path: Path) -> str:
    return path.parent.relative_to(next(p for p in path.parents if p.name == "conf")).as_posix()


def nodes(path: Path) -> Iterator[tuple[str, dict[str, Any], Callable[..., Any]]]:
    """The nodes of a file that build something: (where, node, constructor)."""
    content = OmegaConf.to_container(OmegaConf.load(path))
    for where, node in targets(content):
        yield where, node, get_object(node["_target_"])


def test_all_files_are_looked_at() -> None:
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
def test_every_key_is_explained(path: Path) -> None:
    """A comment on the key's line, or right above it. Keys that only hold others, and _target_, explain themselves."""
    lines = path.read_text().splitlines()
    assert any(line.strip().startswith("#") and "@package" not in line for line in lines[:3]), "no word on the file"
    bare = []
    for i, line in enumerate(lines):
        match = re.match(r"\s*(?:- )?([\w./@-]+):( .*|$)", line)
        if not match or match[1] in ("_target_", "_partial_", "defaults") or "#" in line:
            continue
        # `policy: ${artifact:sft}` says all there is to say.
        holds_others = not match[2].strip() or re.fullmatch(r"\s*\$\{(inputs\.|artifact:|optional_input:)\w+\}", match[2])
        in_defaults = line.lstrip().startswith("- ")
        above = lines[i - 1].strip() if i else ""
        if not holds_others and not in_defaults and not above.startswith("#"):
            bare.append(f"{i + 1}: {line.strip()}")
    # A value such as {a: 1, b: 2} or one of a list of shapes is explained by the line above its head.
    assert not [line for line in bare if not _explained_above(lines, int(line.split(":")[0]) - 1)], bare


def _explained_above(lines: list[str], index: int) -> bool:
    """Whether the head of the block that a line stands in carries a comment."""
    indent = len(lines[index]) - len(lines[index].lstrip())
    for i in range(index - 1, -1, -1):
        here = len(lines[i]) - len(lines[i].lstrip())
        if lines[i].strip() and here < indent:
            return "#" in lines[i] or i > 0 and lines[i - 1].strip().startswith("#")
    return False


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_keys_are_parameters_of_the_constructor(path: Path) -> None:
    for where, node, target in nodes(path):
        given = validation.groups(target) if where == "stage" else ()
        known = validation.parameters(target) or {}
        anything = any(p.kind is p.VAR_KEYWORD for p in known.values())
        extra = set(node) - set(known) - {*validation.RESERVED, "defaults"} - ({"name"} if where == "stage" else set())
        assert anything or not extra, f"{where}: {target} has no {extra}"
        assert not set(node) & set(given), f"{where}: {set(node) & set(given)} are groups, not knobs"


def test_every_knob_of_ours_is_shown_somewhere() -> None:
    """A knob that no YAML shows cannot be found by reading."""
    shown: dict[str, set[str]] = defaultdict(set)
    knobs: dict[str, set[str]] = {}
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for path in FILES:
        for where, node, target in nodes(path):
            name = node["_target_"]
            if not name.startswith("rlhf") or node.get("_partial_"):
                continue
            given = validation.groups(target) if where == "stage" else ()
            knobs[name] = {n for n, p in (validation.parameters(target) or {}).items() if p.kind in kinds} - set(given)
            shown[name] |= set(node) | _in_defaults(path)
    assert {name: missing for name in knobs if (missing := knobs[name] - shown[name])} == {}


def _in_defaults(path: Path) -> set[str]:
    """Keys that other options of the defaults list fill in, as in `/reward@reward: model`."""
    found = set()
    for entry in OmegaConf.load(path).get("defaults") or []:
        for key in entry if isinstance(entry, DictConfig) else [entry]:
            base = path.parent / f"{key}.yaml"
            if "@" in str(key):
                found.add(str(key).split("@")[1].split(".")[-1])
            elif base.exists():
                found |= {str(k) for k in OmegaConf.load(base)} | _in_defaults(base)
    return found


def test_defaults_of_yaml_and_constructor_agree() -> None:
    """One value, two places: where a constructor has a default, the YAML must not say something else.

    A constructor that several options share (the sizes of one model class) may differ from all but one of them.
    """
    seen: dict[tuple[str, str], dict[str, Any]] = defaultdict(dict)
    for path in FILES:
        for _, node, target in nodes(path):
            if not node["_target_"].startswith("rlhf"):
                continue
            for name, parameter in (validation.parameters(target) or {}).items():
                value = node.get(name, parameter.empty)
                if value is parameter.empty or parameter.default is parameter.empty:
                    continue
                computed = any(isinstance(v, str) and ("${" in v or v == "???") for _, v in leaves(value, "v"))
                if computed or validation._has_object(value):
                    continue
                same = _plain(parameter.default) == value
                seen[node["_target_"], name][str(path.relative_to(ROOT))] = (same, value, parameter.default)
    wrong = [
        f"{target}: {name} is {values}"
        for (target, name), values in seen.items()
        if not any(same for same, _, _ in values.values())
    ]
    assert not wrong, "\n".join(wrong)


def _plain(default: Any) -> Any:
    return list(default) if isinstance(default, tuple) else default


def options(group: str) -> list[str]:
    return sorted({path.stem for path in FILES if group_of(path) == group})


@pytest.mark.parametrize("stage", options("stage"))
def test_every_stage_passes_the_checks_as_it_comes(composed: Callable[..., DictConfig], stage: str) -> None:
    roles = ("policy", "reward_model", "comparisons", "demonstrations")
    config = composed(f"stage={stage}", *(f"inputs.{role}=given" for role in roles))
    validation.check(config)


@pytest.mark.parametrize("group", [g for g in validation.SHARED if g != "callbacks"])
def test_every_option_of_the_shared_groups_passes(composed: Callable[..., DictConfig], group: str) -> None:
    assert options(group)
    for option in options(group):
        config = composed("stage=sft", f"{group}={option}")
        try:
            validation.check(config)
        except Exception as e:
            pytest.fail(f"{group}={option}: {e}")


def test_every_objective_fits_a_stage(composed: Callable[..., DictConfig]) -> None:
    register = {stage: composed(f"stage={stage}", "inputs.policy=given") for stage in options("stage")}
    taking = {stage: get_object(c.stage._target_) for stage, c in register.items() if "objective" in c}
    for option in options("objective"):
        target = next(get_object(t) for o, t in validation.objective_options() if o == option)
        fits = [
            stage
            for stage, made in taking.items()
            if issubclass(target, validation._classes(validation.groups(made)["objective"].annotation))
        ]
        assert fits, f"no stage takes objective={option}"
        validation.check(composed(f"stage={fits[0]}", f"objective={option}", "inputs.policy=a", "inputs.reward_model=b"))


@pytest.mark.parametrize("group", ["experiment", "debug", "sweep", "pipeline"])
def test_every_named_set_composes(composed: Callable[..., DictConfig], group: str) -> None:
    assert options(group)
    for option in options(group):
        extra = ["stage=dpo"] if group in ("debug", "sweep") else []
        composed(*extra, f"{group}={option}")
