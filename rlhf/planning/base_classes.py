"""Validation that an option's class derives from the abstract class of the parameter that it is built for."""

import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from rlhf.errors import UserError
from rlhf.planning.instantiate import load_target


def check_base_classes(value: Any, annotation: Any, path: str) -> Iterator[UserError]:
    """Yield a problem for each node in ``value`` whose class does not implement the annotated abstract class.

    Args:
        value: Config value of a parameter: a node with ``_target_``, or a mapping or list of nodes.
        annotation: The parameter's annotation; one without an abstract class accepts any class.
        path: Config key of the value, for messages.
    """
    bases = _abstract_classes(annotation)
    if isinstance(value, dict) and "_target_" in value:
        target = load_target(value["_target_"])
        if bases and not isinstance(target, str):  # a target that cannot be imported is reported elsewhere
            problem = describe_missing_base(target, bases)
            if problem is not None:
                yield UserError(problem, option=path)
    elif isinstance(value, dict) and _is_container(annotation, Mapping):
        for key, inner in value.items():
            yield from check_base_classes(inner, get_args(annotation)[-1], f"{path}.{key}")
    elif isinstance(value, list) and _is_container(annotation, list):
        for index, inner in enumerate(value):
            yield from check_base_classes(inner, get_args(annotation)[-1], f"{path}[{index}]")


def describe_missing_base(target: Any, bases: tuple[type, ...]) -> str | None:
    """Return why a class implements none of some abstract classes, and what to write; None if it implements one."""
    base = bases[0]
    name = getattr(target, "__name__", type(target).__name__)
    imported = f"from {base.__module__} import {base.__name__}"
    if not inspect.isclass(target):
        return f"{name} is not a class derived from {base.__name__}; write {imported} and class NAME({base.__name__})"
    if not issubclass(target, bases):
        return (
            f"{target.__module__}.{name} does not derive from {base.__name__}; "
            f"write {imported} and class {name}({base.__name__})"
        )
    missing = sorted(getattr(target, "__abstractmethods__", ()))
    if missing:
        return f"{target.__module__}.{name} does not define {' and '.join(missing)}; see {base.__module__}"
    return None


def _abstract_classes(annotation: Any) -> tuple[type, ...]:
    """Return the abstract classes of an annotation; empty if it also accepts something else, None apart."""
    if get_origin(annotation) is typing.Annotated:
        return _abstract_classes(get_args(annotation)[0])
    union = get_origin(annotation) in (typing.Union, types.UnionType)
    members = [one for one in (get_args(annotation) if union else (annotation,)) if one is not type(None)]
    return tuple(members) if all(inspect.isabstract(one) for one in members) else ()


def _is_container(annotation: Any, kind: type) -> bool:
    origin = get_origin(annotation)
    return inspect.isclass(origin) and issubclass(origin, kind)
