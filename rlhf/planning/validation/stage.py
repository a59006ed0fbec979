"""Checks of a stage: its groups, its data, and its hyperparameters together."""

import typing
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from hydra.utils import get_object

from rlhf import discovery
from rlhf.errors import RLHFError, UserError, key
from rlhf.models.vocabulary import lacks_template
from rlhf.planning import step_config as configs
from rlhf.planning.base_classes import check_base_classes
from rlhf.planning.instantiate import instantiate_cheap, load_target
from rlhf.planning.validation.nodes import RESERVED, check_node, node_problems
from rlhf.planning.validation.objective import objective_problems
from rlhf.signatures import groups
from rlhf.stage.strategies import offload_problems, sharding_problems

# Groups that rlhf.running.build reads for every stage, whether or not its constructor names them.
SHARED_GROUPS = ("model", "adapter", "precision", "optimizer", "scheduler", "trainer", "logger", "callbacks")


def stage_problems(config: dict[str, Any], prefix: str) -> Iterator[RLHFError]:
    """Yield the problems of the stage's hyperparameters and of the groups that it reads.

    Args:
        config: Config of one step, as plain containers.
        prefix: The step's name and a dot before its keys; "" in a single run.
    """
    node = config.get("stage")
    if node is None:  # the config holds the data of a comparison, which has no stage
        return
    if not isinstance(node, dict) or "_target_" not in node:
        yield UserError("has no _target_, the class of the stage", "add it to the YAML file", f"{prefix}stage")
        return
    stage = load_target(node["_target_"])
    if isinstance(stage, str):
        yield UserError(stage, option=f"{prefix}stage._target_")
        return
    read = groups(stage)
    name = node.get("name", getattr(stage, "__name__", "stage"))
    yield from check_node(stage, node, f"{prefix}stage", given=read, ignore=("name",))
    for parameter_name, value in node.items():
        yield from node_problems(value, f"{prefix}stage.{parameter_name}")
    step = prefix.removesuffix(".")
    for group, parameter in read.items():
        if group not in config and parameter.default is parameter.empty:
            example = _example_option(group)
            at = f"{group}@{step}.{group}" if step else group
            yield UserError(f"stage={name} needs the group {group}", fix=f"type {key(f'+{at}', example)}")
        elif isinstance(config.get(group), dict) and "_target_" not in config[group]:
            fix = "add it to the YAML file"
            yield UserError("its option has no _target_, the class to build", fix, option=f"{prefix}{group}")
        elif group != "objective":  # its class decides which stages take it
            yield from check_base_classes(config.get(group), parameter.annotation, f"{prefix}{group}")
    for group, value in config.items():
        is_node = isinstance(value, dict) and "_target_" in value
        if is_node and group not in read and group not in SHARED_GROUPS and group != "stage":
            reads = f"it reads {', '.join([*read, 'stage'])}"
            yield UserError(f"stage={name} does not read it", reads, option=f"{prefix}{group}")
    for group in ("callbacks", "logger"):
        found = config.get(group)
        for member, value in found.items() if isinstance(found, dict) and "_target_" not in found else ():
            if value is not None and not (isinstance(value, dict) and "_target_" in value):
                problem = "should be null or have a _target_, the class to build"
                yield UserError(problem, option=f"{prefix}{group}.{member}", value=value)
    yield from _record_problems(config, stage, name, prefix)
    yield from _template_problems(config, read)
    yield from objective_problems(config, read.get("objective"), name, step)


def cross_field_problems(config: dict[str, Any], own: Mapping[str, Any], step: str) -> tuple[RLHFError, ...]:
    """Return the problems of hyperparameters and groups together: those of ``Stage.check_parts``, sharding, offloading.

    Runs only after every single option has passed.
    """
    node = config.get("stage")
    if not isinstance(node, dict) or "_target_" not in node:
        return ()
    stage = load_target(node["_target_"])
    found: list[RLHFError] = [*sharding_problems(config, getattr(stage, "shardable", False)), *offload_problems(config)]
    try:
        if hasattr(stage, "check_parts"):
            stage.check_parts(**_collect_parts(config, stage))
    except RLHFError as error:
        found.append(error)
    return tuple(finding for error in found for finding in configs.name_in_step(error, own, step).findings)


def find_unread_data(config: dict[str, Any]) -> tuple[str, ...]:
    """Return the data groups that the stage of a validated config does not read, given its hyperparameters."""
    stage = get_object(config["stage"]["_target_"])
    found: tuple[str, ...] = stage.unread(**_collect_parts(config, stage)) if hasattr(stage, "unread") else ()
    return found


def _collect_parts(config: dict[str, Any], stage: Any) -> dict[str, Any]:
    """Return the arguments of ``Stage.check_parts``: the hyperparameters, and the groups that cost nothing to build."""
    parts = {name: value for name, value in config["stage"].items() if name not in (*RESERVED, "name")}
    for group, parameter in groups(stage).items():
        chosen = config.get(group)
        made = None if chosen is None else instantiate_cheap(chosen)
        if made is not None or type(None) in get_args(parameter.annotation):
            parts[group] = chosen if made is None else made
    if isinstance(config.get("data"), dict):
        parts["record"] = config["data"].get("record")
    trainer = config.get("trainer") or {}
    counts = [trainer.get("devices", 1), trainer.get("num_nodes", 1)]
    if all(type(count) is int and count > 0 for count in counts):  # "auto" and -1 depend on the machine
        parts["world_size"] = counts[0] * counts[1]
    return parts


def _record_problems(config: dict[str, Any], stage: Any, name: str, prefix: str) -> Iterator[RLHFError]:
    """Yield a problem for data whose record type the stage does not read; otherwise it fails when the step starts."""
    for group, kinds in getattr(stage, "reads", {}).items():
        node = config.get(group)
        parts = node.get("parts") if isinstance(node, dict) else None
        nodes = {group: node} if not isinstance(parts, dict) else {f"{group}.parts.{k}": v for k, v in parts.items()}
        for path, one in nodes.items():
            record = one.get("record") if isinstance(one, dict) else None
            if isinstance(record, str) and record not in kinds:
                option = f"{prefix}{path}.record"
                at = f"{group}@{prefix}{group}" if prefix else group
                yield UserError(
                    f"stage={name} reads {'s and '.join(kinds)}s here",
                    fix=f"type another {key(at, 'NAME')}, or {key(option, kinds[-1])} if the rows have its fields",
                    option=option,
                    value=record,
                )


def _template_problems(config: dict[str, Any], read: typing.Collection[str]) -> Iterator[RLHFError]:
    """Yield a problem if a local model's tokenizer lacks the chat template that the data needs.

    Other models are checked when they are loaded.
    """
    model = config.get("model")
    nodes = [config.get(group) for group in read]
    chat = any(isinstance(node, dict) and node.get("record") not in (None, "text") for node in nodes)
    if not chat or not isinstance(model, dict) or model.get("chat_template") is not None:
        return
    named = "tokenizer" if model.get("tokenizer") else "path"
    if lacks_template(model.get(named)):
        yield UserError(
            "its tokenizer has no chat template, and chat data needs one",
            fix=f"type {key('model.chat_template', 'chatml')}",
            option=f"model.{named}",
            value=model[named],
        )


def _example_option(group: str) -> str:
    for path in discovery.named(group):
        return path.stem
    return "OPTION"
