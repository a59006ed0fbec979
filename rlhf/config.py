"""The config of one step: the root config with the step's node merged on top, and then its own root.

Also the resolvers that a YAML may use: ``${optional_input:ROLE}``, ``${pretrained_input:ROLE,HUB_ID,PACKAGE}``,
``${artifact:STEP}``, ``${base_model:STEP}`` and ``${base_weights:STEP}``.
No torch here.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

Plain = dict[str, Any]

_READS = re.compile(r"(?:inputs\.|optional_input:|pretrained_input:)(\w+)")
_REQUIRES = re.compile(r"\$\{inputs\.(\w+)\}")
_REFERS = re.compile(r"\$\{(artifact|base_model|base_weights):\s*(\w+)\s*\}")

# Keys of a pipeline that are no part of any step.
PIPELINE_KEYS = ("steps", "repeat", "rounds", "compare", "until")


@dataclass(frozen=True)
class _Scope:
    """What ``artifact`` and ``base_model`` look at while a step's config is resolved."""

    root: DictConfig
    folders: Mapping[str, Path]


_scope: ContextVar[_Scope | None] = ContextVar("rlhf_scope", default=None)


@contextmanager
def scope(root: DictConfig, folders: Mapping[str, Path]) -> Iterator[None]:
    """While it is open, ``${artifact:STEP}`` is ``folders[STEP]``."""
    token = _scope.set(_Scope(root, folders))
    try:
        yield
    finally:
        _scope.reset(token)


def _optional_input(role: str, default: Any = None, *, _root_: DictConfig) -> Any:
    inputs = _root_.get("inputs")
    value = None if inputs is None else inputs.get(role)
    return default if value is None else value


def _pretrained_input(role: str, hub_id: str, package: str, *, _root_: DictConfig) -> Any:
    """The input, else the hub's model, else (without network) the same model out of a Python package."""
    value = _optional_input(role, _root_=_root_)
    if value is not None:
        return value
    from rlhf import hub  # not at the top: it costs a look at the network, which most commands do not need

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
    """Make the resolvers known to OmegaConf. May be called any number of times."""
    OmegaConf.register_new_resolver("optional_input", _optional_input, replace=True)
    OmegaConf.register_new_resolver("pretrained_input", _pretrained_input, replace=True)
    OmegaConf.register_new_resolver("artifact", _artifact, replace=True)
    OmegaConf.register_new_resolver("base_model", _base_model, replace=True)
    OmegaConf.register_new_resolver("base_weights", _base_weights, replace=True)


register_resolvers()


def names_weights(root: DictConfig) -> bool:
    """Whether the root's ``model`` starts from existing weights, so that a pipeline has nothing to pretrain."""
    return OmegaConf.select(root, "model.path") is not None


def merge(base: Plain, over: Plain) -> Plain:
    """``over`` on top of ``base``; a node with a ``_target_`` is a whole option of a group and replaces the base's."""
    merged = dict(base)
    for key, value in over.items():
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and "_target_" not in value:
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def plain(root: DictConfig) -> Plain:
    """A config as dicts and lists, interpolations unresolved."""
    content = OmegaConf.to_container(root, resolve=False)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def step_config(everything: Plain, step: str | None) -> Plain:
    """The raw config (interpolations unresolved) of one step, or of a single run where ``step`` is None.

    An input that the step leaves null is the root's.
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
    """The roles a step really reads: those its raw config names outside ``inputs``, and those these refer to."""
    inputs = raw.get("inputs") or {}
    found: set[str] = set()
    new = set(_READS.findall(json.dumps({k: v for k, v in raw.items() if k != "inputs"}, default=str)))
    while new:
        found |= new
        new = set(_READS.findall(json.dumps([inputs.get(role) for role in new], default=str))) - found
    return found


def required_roles(raw: Plain) -> dict[str, str]:
    """Role -> the key that requires it, for every ``${inputs.ROLE}`` outside ``inputs``."""
    found: dict[str, str] = {}
    for key, value in leaves({k: v for k, v in raw.items() if k != "inputs"}):
        for role in _REQUIRES.findall(value) if isinstance(value, str) else ():
            found.setdefault(role, key)
    return found


def steps_named(raw: Any) -> list[tuple[str, str]]:
    """Every (resolver, step) of ``${artifact:STEP}`` and its like in a raw config, in order."""
    return list(dict.fromkeys(_REFERS.findall(json.dumps(raw, default=str))))


def resolve(raw: Plain) -> Plain:
    """The raw config with every interpolation replaced by its value; missing values stay ``???``."""
    resolved = OmegaConf.to_container(OmegaConf.create(raw), resolve=True)
    assert isinstance(resolved, dict)
    return {str(k): v for k, v in resolved.items()}


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every (dotted key, value) of a plain config; list positions are numbers."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def targets(node: Any, path: str = "") -> Iterator[tuple[str, Plain]]:
    """Every (dotted key, node) with a ``_target_``, outermost first."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from targets(value, f"{path}.{index}")


def sets(node: Any, key: str) -> bool:
    """Whether a step's own node decides the value of a dotted key of the root, so that the root's is not used."""
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
        if isinstance(node, dict) and "_target_" in node:
            return True
    return not isinstance(node, dict)


def said_of_step(message: str, own: Mapping[str, Any], step: str) -> str:
    """A message about a step, its keys as they are typed in a pipeline; as it is outside of one (``own`` is empty).

    Args:
        message: Of the stage or its parts, which know nothing of pipelines.
        own: What the pipeline sets on the step itself: only its keys begin with the step's name, others are the root's.
        step: Its name.
    """
    if not step or not own:
        return message
    names = "|".join(re.escape(str(name)) for name in own)
    options = [re.escape(str(name)) for name, node in own.items() if isinstance(node, dict) and "_target_" in node]

    def key(match: re.Match[str]) -> str:
        return f"{step}.{match[0]}" if sets(own, match[0]) else match[0]

    begins = r"(?<![\w.@/-])"
    said = re.sub(rf"{begins}(?:{names})(?:\.\w+)+", key, message)
    said = re.sub(rf"{begins}(\w+)@((?:{names})(?:\.\w+)*=)", rf"\1@{step}.\2", said)  # data@text=text
    if options:
        said = re.sub(rf"{begins}({'|'.join(options)})=(?!null\b)(?=\w)", rf"\1@{step}.\1=", said)  # rollout=best_of_k
        said = said.replace(f"stage@{step}.stage=", f"stage@{step}=")
    return said if said.startswith((f"{step}:", f"{step} ")) else f"{step}: {said}"
