"""Check a step's config against the constructors that will read it, before anything is loaded.

There is one source of truth for knobs: the constructor's signature, annotations included
(``beta: Annotated[float, Field(gt=0)] = 0.1``). YAML is checked against it. No torch at module level, but the
constructors are imported, and they may bring it in.
"""

import dataclasses
import inspect
import logging
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, get_args, get_origin

import hydra.utils
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, ValidationError, create_model
from pydantic.errors import PydanticUserError

from rlhf import config as configs
from rlhf import discovery, strategies
from rlhf.errors import RLHFError, UserError, data_keys, first_line, suggest
from rlhf.importing import contained
from rlhf.signatures import groups, parameters
from rlhf.vocabulary import lacks_template

# Groups that build reads for every stage, whether or not its constructor names them.
SHARED = ("model", "adapter", "precision", "optimizer", "scheduler", "trainer", "logger", "callbacks")
# No hyperparameter is right at infinity or nan, and both pass bounds such as greater than 0.
_FINITE = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
LARGEST, SMALLEST = 3.4e38, 1.2e-38  # that a float32 holds; what is smaller loses digits, then is 0
# What Hydra's instantiate reads itself.
RESERVED = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")


def check(config: DictConfig, step: str = "", own: Mapping[str, Any] | None = None) -> None:
    """Check one step's config, which is its own root.

    Args:
        config: The merged config of a single stage.
        step: Its name in a pipeline, put before the keys in messages so that they can be typed as they stand.
        own: What the pipeline sets on the step itself, the rest being the root's; None: all of it.

    Raises:
        UserError: one line for each finding, all of them at once.
    """
    prefix = f"{step}." if step else ""
    plain, errors = _resolve(config, prefix)
    if isinstance(plain, dict):
        for key, node in plain.items():
            if key != "stage":
                errors += _walk(node, f"{prefix}{key}")
        errors += _stage(plain, prefix)
        errors += _roots(plain, prefix)
        if isinstance(plain.get("trainer"), dict):
            found = strategies.problems(plain["trainer"])
            errors += [configs.said_of_step(x, own, step) if own and "trainer" in own else x for x in found]
        if not errors:
            errors += _together(plain, plain if own is None else own, step)
    if errors:
        raise UserError("\n".join(dict.fromkeys(errors)))


# -- values ---------------------------------------------------------------------------------------------------------


def _resolve(config: DictConfig, prefix: str) -> tuple[Any, list[str]]:
    """The config as plain containers; what does not resolve is left out (None) and reported."""
    errors: list[str] = []

    def plain(node: Any, path: str) -> Any:
        if OmegaConf.is_dict(node):
            return {k: child(node, k, f"{path}.{k}" if path else str(k)) for k in node}
        if OmegaConf.is_list(node):
            return [child(node, i, f"{path}[{i}]") for i in range(len(node))]
        return node

    def child(parent: Any, key: Any, path: str) -> Any:
        if OmegaConf.is_missing(parent, key):
            errors.append(f"{prefix}{path}: no value; type {prefix}{path}=...")
            return UNRESOLVED
        try:
            return plain(parent[key], path)
        except RLHFError as e:
            errors.append(f"{prefix}{path}: {e}")
        except OmegaConfBaseException as e:
            errors.append(f"{prefix}{path}: {first_line(e)}")
        return UNRESOLVED

    return plain(config, ""), errors


class _Unresolved:
    """Stands for a value that is missing or did not resolve: already reported, so accepted everywhere."""


UNRESOLVED = _Unresolved()


# -- nodes ----------------------------------------------------------------------------------------------------------


def _walk(node: Any, path: str) -> Iterator[str]:
    """Findings of every ``_target_`` node at or below ``node``."""
    if isinstance(node, list):
        for i, item in enumerate(node):
            yield from _walk(item, f"{path}[{i}]")
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        target = _load(node["_target_"])
        if isinstance(target, str):
            yield f"{path}._target_: {target}"
            return
        yield from check_node(target, node, path)
    for key, value in node.items():
        yield from _walk(value, f"{path}.{key}")


def _load(name: Any) -> Any:
    """The object of a ``_target_``, or why there is none, as text."""
    if not isinstance(name, str):
        return f"{name} is no dotted path of a class or function"
    log = logging.getLogger(hydra.utils.__name__)  # it prints lines of its own
    silent, log.disabled = log.disabled, True
    try:
        with contained():
            found = get_object(name)
        return found if callable(found) else f"{name} is no class or function"
    except Exception as e:
        # Hydra wraps the reason; a plugin author needs the reason itself.
        root: BaseException = e
        while root.__cause__ is not None:
            root = root.__cause__
        return f"cannot import {name} ({type(root).__name__}: {first_line(root)})"
    finally:
        log.disabled = silent


def check_node(
    target: Callable[..., Any],
    node: dict[str, Any],
    path: str,
    given: typing.Collection[str] = (),
    ignore: typing.Collection[str] = (),
) -> list[str]:
    """Findings of one node against its constructor: unknown keys, missing values, types, ranges, choices.

    Args:
        target: The class or function that will be called.
        node: Its keyword arguments, with Hydra's reserved keys.
        path: Where it stands, for messages.
        given: Parameters that someone else will fill in.
        ignore: Keys of the node that are not meant for the constructor.
    """
    signature = parameters(target)
    if signature is None:
        return []
    values = {k: v for k, v in node.items() if k not in RESERVED and k not in ignore}
    kinds = {p.kind for p in signature.values()}
    known = [n for n, p in signature.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and n not in given]
    errors = []
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        for key in values.keys() - set(known):
            errors.append(f"{path}.{key}: unknown option{suggest(str(key), known, f'{path}.')}")
    for name in known:
        parameter = signature[name]
        if name in values:
            errors += _check_value(values[name], parameter.annotation, f"{path}.{name}")
        elif parameter.default is parameter.empty and not node.get("_partial_") and "_args_" not in node:
            errors.append(f"{path}.{name}: required, no value; type {path}.{name}=...")
    if not errors and dataclasses.is_dataclass(target) and not holds_object(values) and not node.get("_partial_"):
        # A dataclass only holds values, so making one costs nothing and runs the checks of its __post_init__.
        try:
            target(**values)
        except (ValueError, TypeError, RLHFError) as e:
            errors.append(_named(first_line(e), path))
    elif not errors and hasattr(target, "check_knobs") and UNRESOLVED not in values.values():
        # For a class that holds more than values: what it can tell from its knobs together, before it is built.
        try:
            target.check_knobs(**values)
        except (ValueError, RLHFError) as e:
            message = first_line(e)
            if hasattr(target, "digest") and message.startswith("data."):
                errors.append(data_keys(message, path))
            else:
                errors.append(_named(message, path))
    return errors


def _named(message: str, path: str) -> str:
    """A message about the node at ``path``, which may call it by its group: those keys get the whole path instead."""
    group, dot, _ = message.partition(".")
    if not dot or group not in path.split("."):
        return f"{path}: {message}"
    return re.sub(rf"(?<![\w./-]){re.escape(group)}\.(?=\w)", lambda _: f"{path}.", message)


def holds_object(value: Any) -> bool:
    """Whether a value holds something that is built from a node of its own, or did not resolve."""
    if isinstance(value, dict):
        return "_target_" in value or any(holds_object(v) for v in value.values())
    if isinstance(value, list):
        return any(holds_object(v) for v in value)
    return value is UNRESOLVED


def _check_value(value: Any, annotation: Any, path: str) -> list[str]:
    if annotation in (inspect.Parameter.empty, Any) or holds_object(value):
        return []
    model = _value_model(annotation)
    if model is None:
        return []
    try:
        checked = model(value=value).value
    except ValidationError as e:
        # A union reports each of its members; the first that is about the value itself says enough.
        messages = list(dict.fromkeys(str(x["msg"]).replace("Input should", "should") for x in e.errors()))
        inner = [".".join(str(part) for part in x["loc"][1:] if isinstance(part, int)) for x in e.errors()]
        where = path + (f"[{inner[0]}]" if inner[0] else "")
        return [f"{where}={_show(value)}: {' or '.join(messages)}"]
    if isinstance(checked, float) and abs(checked) > LARGEST:
        return [f"{path}={_show(value)}: is too large for a float32; type a smaller number"]
    if isinstance(checked, float) and 0 < abs(checked) < SMALLEST:
        return [f"{path}={_show(value)}: is too small for a float32; type 0 or a larger number"]
    if type(checked) is not type(value) and _scalar(checked) and _scalar(value) and not _widened(value, checked):
        # pydantic would convert, but the constructor gets the value as it stands.
        return [f"{path}={_show(value)}: should be of type {type(checked).__name__}, not {type(value).__name__}"]
    return []


def _value_model(annotation: Any) -> Any:
    """The pydantic model of one value of this type; None for a type that pydantic does not know."""
    key = repr(annotation)  # an Annotated with a Field has no hash
    if key not in _MODELS or _MODELS[key][0] != annotation:
        try:
            _MODELS[key] = annotation, create_model("Value", __config__=_FINITE, value=(annotation, ...))
        except PydanticUserError:
            _MODELS[key] = annotation, None
    return _MODELS[key][1]


_MODELS: dict[str, tuple[Any, Any]] = {}  # making one takes milliseconds, and a pipeline checks thousands of values


def _scalar(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _widened(value: Any, checked: Any) -> bool:
    return type(value) is int and type(checked) is float


def _show(value: Any) -> str:
    return "null" if value is None else str(value)


# -- the stage ------------------------------------------------------------------------------------------------------


def _stage(config: dict[str, Any], prefix: str) -> Iterator[str]:
    node = config.get("stage")
    if node is None:  # the data of a comparison, which has no stage
        return
    if not isinstance(node, dict) or "_target_" not in node:
        yield f"{prefix}stage: has no _target_, the class of the stage; add it to the YAML file"
        return
    stage = _load(node["_target_"])
    if isinstance(stage, str):
        yield f"{prefix}stage._target_: {stage}"
        return
    asked = groups(stage)
    name = node.get("name", getattr(stage, "__name__", "stage"))
    yield from check_node(stage, node, f"{prefix}stage", given=asked, ignore=("name",))
    for key, value in node.items():
        yield from _walk(value, f"{prefix}stage.{key}")
    step = prefix.removesuffix(".")
    for group, parameter in asked.items():
        if group not in config and parameter.default is parameter.empty:
            example = _an_option(group)
            at = f"{group}@{step}.{group}" if step else group
            yield f"stage={name} needs the group {group}; type +{at}={example}"
        elif isinstance(config.get(group), dict) and "_target_" not in config[group]:
            yield f"{prefix}{group}: its option has no _target_, the class to build; add it to the YAML file"
    for group, value in config.items():
        is_node = isinstance(value, dict) and "_target_" in value
        if is_node and group not in asked and group not in SHARED and group != "stage":
            yield f"{prefix}{group}: stage={name} does not read it; it reads {', '.join([*asked, 'stage'])}"
    for group in ("callbacks", "logger"):
        found = config.get(group)
        for key, value in found.items() if isinstance(found, dict) and "_target_" not in found else ():
            if value is not None and not (isinstance(value, dict) and "_target_" in value):
                yield f"{prefix}{group}.{key}={_show(value)}: should be null or have a _target_, the class to build"
    yield from _records(config, stage, name, prefix)
    yield from _template(config, asked)
    yield from _objective(config, asked.get("objective"), name, step)


def _together(config: dict[str, Any], own: Mapping[str, Any], step: str) -> list[str]:
    """What the stage says of its knobs and groups together (``Stage.check_parts``), each being right by itself."""
    node = config.get("stage")
    if not isinstance(node, dict) or "_target_" not in node:
        return []
    stage = _load(node["_target_"])
    if not hasattr(stage, "check_parts"):
        return []
    try:
        stage.check_parts(**_parts(config, stage))
    except RLHFError as e:
        return [configs.said_of_step(str(e), own, step)]
    return []


def unread(config: dict[str, Any]) -> tuple[str, ...]:
    """Groups of data that the stage of a checked config does not read, its knobs being what they are."""
    stage = get_object(config["stage"]["_target_"])
    found: tuple[str, ...] = stage.unread(**_parts(config, stage)) if hasattr(stage, "unread") else ()
    return found


def _parts(config: dict[str, Any], stage: Any) -> dict[str, Any]:
    """Knobs of the stage and groups that cost nothing to build, as ``Stage.check_parts`` gets them."""
    parts = {name: value for name, value in config["stage"].items() if name not in (*RESERVED, "name")}
    for group, parameter in groups(stage).items():
        chosen = config.get(group)
        made = None if chosen is None else light(chosen)
        if made is not None or type(None) in get_args(parameter.annotation):
            parts[group] = chosen if made is None else made
    if isinstance(config.get("data"), dict):
        parts["record"] = config["data"].get("record")
    trainer = config.get("trainer") or {}
    counts = [trainer.get("devices", 1), trainer.get("num_nodes", 1)]
    if all(type(count) is int and count > 0 for count in counts):  # "auto" and -1 are known on the machine alone
        parts["processes"] = counts[0] * counts[1]
    return parts


def _records(config: dict[str, Any], stage: Any, name: str, prefix: str) -> Iterator[str]:
    """Whether the data holds what the stage reads: records of another type are found when its step begins, at best."""
    for group, kinds in getattr(stage, "reads", {}).items():
        node = config.get(group)
        parts = node.get("parts") if isinstance(node, dict) else None
        nodes = {group: node} if not isinstance(parts, dict) else {f"{group}.parts.{k}": v for k, v in parts.items()}
        for path, one in nodes.items():
            record = one.get("record") if isinstance(one, dict) else None
            if isinstance(record, str) and record not in kinds:
                yield (
                    f"{prefix}{path}.record={record}: stage={name} reads {'s and '.join(kinds)}s here; type another "
                    f"{group}=, or {prefix}{path}.record={kinds[-1]} if the rows hold what that takes"
                )


def _template(config: dict[str, Any], asked: typing.Collection[str]) -> Iterator[str]:
    """Whether a local model's tokenizer lacks the chat template that the data needs; of others it is known later."""
    model = config.get("model")
    nodes = [config.get(group) for group in asked]
    chat = any(isinstance(node, dict) and node.get("record") not in (None, "text") for node in nodes)
    if not chat or not isinstance(model, dict) or model.get("chat_template") is not None:
        return
    key = "tokenizer" if model.get("tokenizer") else "path"
    if lacks_template(model.get(key)):
        yield (
            f"model.{key}={model[key]}: its tokenizer has no chat template, chat data needs one; type "
            "model.chat_template=chatml"
        )


def light(node: dict[str, Any]) -> Any:
    """The object of a node that costs nothing to build, since it only holds knobs: a dataclass or a sampler."""
    from rlhf.rollout import Sampler

    target = _load(node["_target_"])
    light = dataclasses.is_dataclass(target) or inspect.isclass(target) and issubclass(target, Sampler)
    return instantiate(node) if light else None


def _objective(config: dict[str, Any], parameter: inspect.Parameter | None, stage: str, step: str) -> Iterator[str]:
    """Whether the objective speaks the protocol of the stage: wrong pairs compose silently."""
    node = config.get("objective")
    if parameter is None or not isinstance(node, dict) or "_target_" not in node:
        return
    wanted = _classes(parameter.annotation)
    target = _load(node["_target_"])
    if not wanted or not inspect.isclass(target) or issubclass(target, wanted):
        return
    offered = dict(objective_options())
    chosen = next((o for o, t in offered.items() if t == node["_target_"]), target.__name__)
    fitting = [o for o, t in offered.items() if inspect.isclass(c := _load(t)) and issubclass(c, wanted)]
    key = f"objective@{step}.objective" if step else "objective"
    takes = ", ".join(sorted(fitting)) or "none that is installed"
    yield f"stage={stage} does not take {key}={chosen}; it takes: {takes}"


def _classes(annotation: Any) -> tuple[type, ...]:
    """The classes of an annotation, unions taken apart; empty when it constrains nothing."""
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(c for part in get_args(annotation) for c in _classes(part) if c is not type(None))
    origin = get_origin(annotation) or annotation
    if not inspect.isclass(origin) or origin is object:
        return ()
    return (origin,)


def objective_options() -> Iterator[tuple[str, str]]:
    """Every objective option and its ``_target_``."""
    for path in discovery.named("objective"):
        target = OmegaConf.select(OmegaConf.load(path), "_target_")
        if target:
            yield path.stem, target


def _an_option(group: str) -> str:
    for path in discovery.named(group):
        return path.stem
    return "OPTION"


def _roots(config: dict[str, Any], prefix: str) -> Iterator[str]:
    """Plain values of the wrong type at the root, and misspelt keys, which a YAML file can bring in unnoticed."""
    root = _root_config()
    for key, default in root.items():
        if isinstance(default, int | str) and "${" not in str(default) and key in config:
            yield from _check_value(config[key], type(default), f"{prefix}{key}")
    known = root_keys() - {"hydra"}
    for key, value in config.items():
        if key in known or isinstance(value, dict) and "_target_" in value:
            continue
        hint = suggest(str(key), known, prefix)
        if hint.startswith(" (did"):
            yield f"{prefix}{key}: unknown option{hint}"


def root_keys() -> set[str]:
    """Return the keys that a config may have at its root: those of config.yaml, and the groups."""
    return {str(key) for key in _root_config() if key != "defaults"} | discovery.group_names() | {"text", "steps"}


@cache
def _root_config() -> DictConfig:
    """The root's YAML as it stands, read once."""
    root = OmegaConf.load(discovery.conf_dir() / "config.yaml")
    assert isinstance(root, DictConfig)
    return root
