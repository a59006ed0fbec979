"""Checks of config nodes against the constructors that they name."""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Any

from rlhf.errors import RLHFError, UserError, first_line, key, moved, parse_override, suggest
from rlhf.planning.base_classes import check_base_classes
from rlhf.planning.instantiate import load_target
from rlhf.planning.validation.values import UNRESOLVED, holds_object, value_problems
from rlhf.runs.data_source import is_data
from rlhf.signatures import parameters

# Keys that Hydra's instantiate reads itself.
RESERVED = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")


def node_problems(node: Any, path: str) -> Iterator[RLHFError]:
    """Yield the problems of every ``_target_`` node at or below ``node``."""
    if isinstance(node, list):
        for i, item in enumerate(node):
            yield from node_problems(item, f"{path}[{i}]")
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        target = load_target(node["_target_"])
        if isinstance(target, str):
            yield UserError(target, option=f"{path}._target_")
            return
        yield from check_node(target, node, path)
    for name, value in node.items():
        yield from node_problems(value, f"{path}.{name}")


def check_node(
    target: Callable[..., Any],
    node: dict[str, Any],
    path: str,
    given: typing.Collection[str] = (),
    ignore: typing.Collection[str] = (),
) -> list[RLHFError]:
    """Return the problems of one node against its constructor: unknown keys, missing values, types, ranges, choices.

    Args:
        target: The class or function that will be called.
        node: Its keyword arguments, with Hydra's reserved keys.
        path: Its path in the config, for messages.
        given: Parameters that the caller will fill in.
        ignore: Keys of the node that are not meant for the constructor.
    """
    signature = parameters(target)
    if signature is None:
        return []
    values = {k: v for k, v in node.items() if k not in RESERVED and k not in ignore}
    kinds = {p.kind for p in signature.values()}
    known = [n for n, p in signature.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and n not in given]
    errors: list[RLHFError] = []
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        for unknown in (name for name in values if name not in known):
            hint = suggest(str(unknown), known, f"{path}.")
            errors.append(UserError(f"unknown option{hint}", option=f"{path}.{unknown}"))
    for name in known:
        parameter = signature[name]
        if name in values:
            errors += value_problems(values[name], parameter.annotation, f"{path}.{name}")
            errors += check_base_classes(values[name], parameter.annotation, f"{path}.{name}")
        elif parameter.default is parameter.empty and not node.get("_partial_") and "_args_" not in node:
            fix = f"type {key(f'{path}.{name}', '...')}"
            errors.append(UserError("is required and has no value", fix=fix, option=f"{path}.{name}"))
    if not errors and dataclasses.is_dataclass(target) and not holds_object(values) and not node.get("_partial_"):
        # A dataclass only holds values, so building it costs nothing and runs the checks of its __post_init__.
        try:
            target(**values)
        except RLHFError as e:
            errors += _name_path(e, path)
        except (ValueError, TypeError) as e:
            errors.append(UserError(first_line(e), option=path))
    elif not errors and hasattr(target, "check_hyperparameters") and UNRESOLVED not in values.values():
        # A class that holds more than values checks its hyperparameters together before it is built.
        try:
            target.check_hyperparameters(**values)
        except RLHFError as e:
            errors += _name_path(e, path, "data" if is_data(target) else "")
        except ValueError as e:
            errors.append(UserError(first_line(e), option=path))
    return errors


def _name_path(error: RLHFError, path: str, own_group: str = "") -> tuple[RLHFError, ...]:
    """Return the findings of an error of a node, with the node's whole path in place of its group's name in keys.

    Args:
        error: Error of the node's constructor.
        path: Path of the node in the config.
        own_group: Name by which the constructor knows its group, if the path may have another ("text" for "data").
    """
    for finding in error.findings:
        group = parse_override(finding.option)[2].partition(".")[0]
        if group and (group == own_group or group in path.split(".")):
            finding.rename(moved(group, path))
        elif finding.option:
            finding.where = path
        else:
            finding.option = path
    return error.findings
