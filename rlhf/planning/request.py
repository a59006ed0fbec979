"""Request of a command: its root config with the rounds written out, and what is read from it once.

This module imports no torch.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from rlhf import discovery
from rlhf.errors import UserError, suggest
from rlhf.planning import rounds
from rlhf.planning import step_config as configs
from rlhf.planning.recipe import RECIPES
from rlhf.storage.plain import Plain, plain

_NOT_RUNS = ("generations", "reports", "sweeps")  # directories of outputs/ that hold no runs


@dataclass(frozen=True)
class Request:
    """Request of a single run or a pipeline.

    Attributes:
        root: the composed config, in which every round of a repeated step is a step.
        raw: the same as plain containers, interpolations unresolved.
        names: the steps of the pipeline, in order; empty for a single run.
        last: the last step to plan; None for a single run.
        rounds: repeated step -> its names by round.
        overrides: the typed overrides.
        inputs: role -> value given at the root.
        outputs: the directory that holds the runs.
        starts_from_weights: whether the pipeline's model has weights, so that nothing is pretrained.
    """

    root: DictConfig
    raw: Plain
    names: tuple[str, ...]
    last: str | None
    rounds: Mapping[str, Sequence[str]]
    overrides: tuple[str, ...]
    inputs: Plain
    outputs: Path
    starts_from_weights: bool

    def own(self, name: str | None) -> Plain:
        """Return the values that the pipeline sets on a step itself; empty in a single run."""
        own: Plain = {} if name is None else self.raw[name]
        return own


def read_request(root: DictConfig, overrides: Sequence[str]) -> Request:
    """Return the request of a composed config, rounds expanded.

    Raises:
        UserError: The pipeline's own keys name no steps, rounds or directories.
    """
    _validate_kinds(root)
    root, repeated = rounds.expand(root)
    names = _step_names(root)
    raw = plain(root)
    inputs = configs.resolve({"inputs": raw.get("inputs") or {}})["inputs"]
    if root.get("outputs") == "":  # an empty path would be the working directory
        fix = "type outputs=DIRECTORY, or leave it out"
        raise UserError("is not the name of a directory", fix=fix, option="outputs", value="")
    return Request(
        root=root,
        raw=raw,
        names=names,
        last=_last_step(names, root.get("until")) if names else None,
        rounds=repeated,
        overrides=tuple(overrides),
        inputs=inputs,
        outputs=Path(str(root.get("outputs") or "outputs")),
        starts_from_weights=bool(names) and configs.names_weights(root),
    )


def _validate_kinds(root: DictConfig) -> None:
    """Raise if one of a pipeline's own keys is not a list or a mapping as it has to be."""
    for key, is_kind, kind in (
        ("steps", OmegaConf.is_list, "a list of steps"),
        ("repeat", OmegaConf.is_list, "a list of steps"),
        ("compare", OmegaConf.is_dict, "a mapping"),
        ("inputs", OmegaConf.is_dict, "a mapping"),
    ):
        if root.get(key) is not None and not is_kind(root.get(key)):
            fix = "leave it out, or type a key below it" if kind == "a mapping" else "leave it out"
            raise UserError(f"must be {kind}", fix=fix, option=key, value=root.get(key))
    if "recipe" in root and root.recipe not in RECIPES:
        fix = f"type recipe={' or recipe='.join(RECIPES)}"
        raise UserError("no such recipe", fix=fix, option="recipe", value=root.recipe)


def _step_names(root: DictConfig) -> tuple[str, ...]:
    """Return the steps of the pipeline; empty for a single stage."""
    if root.get("steps") is None:
        if root.get("stage") is None:
            raise UserError("nothing to run", fix="type stage=NAME or pipeline=NAME (rlhf --help lists both)")
        if root.get("until") is not None:
            fix = "leave it out, or type pipeline=NAME"
            raise UserError("only a pipeline reads it", fix=fix, option="until", value=root.until)
        return ()
    if root.get("stage") is not None:
        fix = "type one of them, or change a step with stage@STEP=NAME"
        raise UserError("both a stage and a pipeline are given", fix=fix)
    names = [str(name) for name in root.steps]
    if not names or len(set(names)) < len(names):
        problem = "must list at least one step, and each step once"
        raise UserError(problem, fix="type steps=[STEP,STEP]", option="steps", value=names)
    for name in names:
        validate_path_name("steps", name)
        if root.get(name) is not None and not isinstance(root[name], DictConfig):
            fix = f"type stage@{name}={root[name]}"
            raise UserError(f"{name} is a step", fix=fix, option=name, value=root[name])
        for group in discovery.group_names() & set(root.get(name) or ()):
            if isinstance(value := root[name].get(group), str):
                place = name if group == "stage" else f"{name}.{group}"
                fix = f"type {group}@{place}={value}"
                raise UserError(f"{group} is a group of options", fix=fix, option=f"{name}.{group}", value=value)
        if not isinstance(root.get(name), DictConfig) or "stage" not in root[name]:
            fix = f"add /stage@{name}: STAGE to the defaults of the pipeline"
            raise UserError(f"names {name}, which is not a step with a stage", fix=fix, option="steps")
    return tuple(names)


def validate_path_name(option: str, name: str) -> None:
    """Raise for a name that is not a plain word, because it becomes part of paths below the outputs directory."""
    if name in _NOT_RUNS:
        problem = f"is reserved, because outputs/{name} holds no runs"
        raise UserError(problem, fix="type another name", option=option, value=name)
    if re.fullmatch(r"[A-Za-z0-9_-]+", name) is None:
        problem = "must consist of letters, digits, _ and -, because it becomes the name of a directory"
        raise UserError(problem, fix="type another name", option=option, value=name)


def _last_step(names: tuple[str, ...], until: str | None) -> str:
    if until is None:
        return names[-1]
    if until not in names:
        raise UserError(f"no such step{suggest(until, names, 'until=')}", option="until", value=until)
    return until
