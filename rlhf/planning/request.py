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
        raise UserError("outputs=: names no directory; type outputs=DIRECTORY, or leave it out")
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
            raise UserError(f"{key}={root.get(key)}: should be {kind}; leave it out, or take a key below it")


def _step_names(root: DictConfig) -> tuple[str, ...]:
    """Return the steps of the pipeline; empty for a single stage."""
    if root.get("steps") is None:
        if root.get("stage") is None:
            raise UserError("nothing to run: type stage=NAME or pipeline=NAME (rlhf --help lists both)")
        if root.get("until") is not None:
            raise UserError(f"until={root.until} is for pipelines; leave it out, or type pipeline=NAME")
        return ()
    if root.get("stage") is not None:
        raise UserError("both a stage and a pipeline are given: type one, or change a step with stage@STEP=NAME")
    names = [str(name) for name in root.steps]
    if not names or len(set(names)) < len(names):
        raise UserError(f"steps={names}: a pipeline lists each of its steps once")
    for name in names:
        validate_path_name("steps", name)
        if root.get(name) is not None and not isinstance(root[name], DictConfig):
            raise UserError(f"{name}={root[name]}: {name} is a step; type stage@{name}={root[name]}")
        for group in discovery.group_names() & set(root.get(name) or ()):
            if isinstance(value := root[name].get(group), str):
                place = name if group == "stage" else f"{name}.{group}"
                raise UserError(f"{name}.{group}={value}: {group} is a group of options; type {group}@{place}={value}")
        if not isinstance(root.get(name), DictConfig) or "stage" not in root[name]:
            raise UserError(f"steps names {name}, but there is no such step: add /stage@{name}: STAGE to its defaults")
    return tuple(names)


def validate_path_name(key: str, name: str) -> None:
    """Raise for a name that is not a plain word, because it becomes part of paths below the outputs directory."""
    if name in _NOT_RUNS:
        raise UserError(f"{key}={name}: outputs/{name} holds no runs; type another name")
    if re.fullmatch(r"[A-Za-z0-9_-]+", name) is None:
        raise UserError(f"{key}={name}: a name has letters, digits, _ and - alone, since it names a directory")


def _last_step(names: tuple[str, ...], until: str | None) -> str:
    if until is None:
        return names[-1]
    if until not in names:
        raise UserError(f"until={until}: no such step{suggest(until, names, 'until=')}")
    return until
