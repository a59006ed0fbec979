"""Config of one step: the root config with the step's node merged on top; the result is its own root.

Also the resolvers that a YAML may use: ``${optional_input:ROLE}``, ``${pretrained_input:ROLE,HUB_ID[,PACKAGE]}``,
``${artifact:STEP}``, ``${base_model:STEP}`` and ``${base_weights:STEP}``, and those of `rlhf.planning.recipe`. This
module imports no torch.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from rlhf.errors import RLHFError, moved, parse_override
from rlhf.planning.recipe import register_recipe_resolvers
from rlhf.storage.plain import Plain, leaves, merge, sets

E = TypeVar("E", bound=RLHFError)

_READS = re.compile(r"(?:inputs\.|optional_input:|pretrained_input:)(\w+)")
_REQUIRES = re.compile(r"\$\{inputs\.(\w+)\}")
_REFERS = re.compile(r"\$\{(artifact|base_model|base_weights):\s*(\w+)\s*\}")

# Keys of a pipeline that belong to no step.
PIPELINE_KEYS = ("steps", "repeat", "rounds", "compare", "until")


@dataclass(frozen=True)
class _Scope:
    """Root config and run directories that the resolvers read while a step's config is resolved."""

    root: DictConfig
    folders: Mapping[str, Path]


_scope: ContextVar[_Scope | None] = ContextVar("rlhf_scope", default=None)


@contextmanager
def scope(root: DictConfig, folders: Mapping[str, Path]) -> Iterator[None]:
    """Context manager: resolve ``${artifact:STEP}`` to ``folders[STEP]``."""
    token = _scope.set(_Scope(root, folders))
    try:
        yield
    finally:
        _scope.reset(token)


def _optional_input(role: str, default: Any = None, *, _root_: DictConfig) -> Any:
    inputs = _root_.get("inputs")
    value = None if inputs is None else inputs.get(role)
    return default if value is None else value


def _pretrained_input(role: str, hub_id: str, package: str = "", *, _root_: DictConfig) -> Any:
    """Return the input, else the hub's model, else (without network) the same model from a Python package, if any."""
    value = _optional_input(role, _root_=_root_)
    if value is not None:
        return value
    from rlhf.storage import hub  # imported late: choosing needs network access, which most commands do not

    return hub.choose(hub_id, package).path


def _artifact(step: str) -> str:
    current = _scope.get()
    if current is None or step not in current.folders:
        raise ValueError(f"${{artifact:{step}}} has a value only in a pipeline that has the step {step}")
    return str(current.folders[step])


def _base_model(step: str) -> str | None:
    current = _scope.get()
    return None if current is not None and names_weights(current.root) else _artifact(step)


def _base_weights(step: str) -> str:
    current = _scope.get()
    return str(current.root.model.path) if current is not None and names_weights(current.root) else _artifact(step)


def register_resolvers() -> None:
    """Register the resolvers with OmegaConf. May be called any number of times."""
    OmegaConf.register_new_resolver("optional_input", _optional_input, replace=True)
    OmegaConf.register_new_resolver("pretrained_input", _pretrained_input, replace=True)
    OmegaConf.register_new_resolver("artifact", _artifact, replace=True)
    OmegaConf.register_new_resolver("base_model", _base_model, replace=True)
    OmegaConf.register_new_resolver("base_weights", _base_weights, replace=True)
    register_recipe_resolvers()


register_resolvers()


def names_weights(root: DictConfig) -> bool:
    """Return whether the root's ``model`` starts from existing weights, so that a pipeline has nothing to pretrain."""
    return OmegaConf.select(root, "model.path") is not None


def step_config(everything: Plain, step: str | None) -> Plain:
    """Return the raw config (interpolations unresolved) of one step, or of a single run if ``step`` is None.

    An input that the step leaves null falls back to the root's.
    """
    steps = everything.get("steps") or []
    shared = {k: v for k, v in everything.items() if k not in PIPELINE_KEYS and k not in steps}
    if step is None:
        return shared
    own = everything[step]
    config = merge(shared, own)
    inputs = shared.get("inputs") or {}
    mine = own.get("inputs") or {}
    config["inputs"] = inputs | {role: value for role, value in mine.items() if value is not None}
    return config


def roles_read(raw: Plain) -> set[str]:
    """Return the roles that a step reads: those named in its raw config outside ``inputs``, and those they refer to."""
    inputs = raw.get("inputs") or {}
    found: set[str] = set()
    new = set(_READS.findall(json.dumps({k: v for k, v in raw.items() if k != "inputs"}, default=str)))
    while new:
        found |= new
        new = set(_READS.findall(json.dumps([inputs.get(role) for role in new], default=str))) - found
    return found


def required_roles(raw: Plain) -> dict[str, str]:
    """Return role -> the key that requires it, for every ``${inputs.ROLE}`` outside ``inputs``."""
    found: dict[str, str] = {}
    for key, value in leaves({k: v for k, v in raw.items() if k != "inputs"}):
        for role in _REQUIRES.findall(value) if isinstance(value, str) else ():
            found.setdefault(role, key)
    return found


def steps_named(raw: Any) -> list[tuple[str, str]]:
    """Return every distinct (resolver, step) of ``${artifact:STEP}``, ``base_model`` and ``base_weights``, in order."""
    return list(dict.fromkeys(_REFERS.findall(json.dumps(raw, default=str))))


def resolve(raw: Plain) -> Plain:
    """Return the raw config with every interpolation replaced by its value; missing values stay ``???``."""
    resolved = OmegaConf.to_container(OmegaConf.create(raw), resolve=True)
    assert isinstance(resolved, dict)
    return {str(k): v for k, v in resolved.items()}


def name_in_step(error: E, own: Mapping[str, Any], step: str) -> E:
    """Rename the config keys of an error about a step in place, as they are typed in a pipeline, and return it.

    Outside of a pipeline (``own`` is empty) nothing changes.

    Args:
        error: Error of the stage or its parts, which have no knowledge of pipelines.
        own: Values that the pipeline sets on the step itself; only their keys get the step's name as prefix, all others
            are keys of the root.
        step: Name of the step.
    """
    if not step or not own:
        return error

    def rename(typed: str) -> str:
        sign, group, path, value = parse_override(typed)
        first = path.partition(".")[0]
        if not sets(own, path):
            return typed
        if path == "stage" and value is not None and not group:
            return f"{sign}stage@{step}={value}"
        return moved(first, f"{step}.{first}")(typed)

    error.rename(rename)
    for finding in error.findings:
        if not finding.where and not parse_override(finding.option)[2].startswith(f"{step}."):
            finding.where = step
    return error
