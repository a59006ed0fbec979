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
            error = missing_base_error(target, bases, path)
            if error is not None:
                yield error
    elif isinstance(value, dict) and _is_container(annotation, Mapping):
        for key, inner in value.items():
            yield from check_base_classes(inner, get_args(annotation)[-1], f"{path}.{key}")
    elif isinstance(value, list) and _is_container(annotation, list):
        for index, inner in enumerate(value):
            yield from check_base_classes(inner, get_args(annotation)[-1], f"{path}[{index}]")


def missing_base_error(target: Any, bases: tuple[type, ...], option: str = "") -> UserError | None:
    """Return the error for a class that implements none of some abstract classes; None if it implements one.

    Args:
        target: The class.
        bases: The abstract classes.
        option: Config key that names the class.
    """
    base = bases[0]
    name = getattr(target, "__name__", type(target).__name__)
    imported = f"from {base.__module__} import {base.__name__}"
    if not inspect.isclass(target):
        fix = f"write {imported} and class NAME({base.__name__})"
        return UserError(f"{name} is not a class derived from {base.__name__}", fix, option)
    if not issubclass(target, bases):
        fix = f"write {imported} and class {name}({base.__name__})"
        return UserError(f"{target.__module__}.{name} does not derive from {base.__name__}", fix, option)
    missing = sorted(getattr(target, "__abstractmethods__", ()))
    if missing:
        problem = f"{target.__module__}.{name} does not define {' and '.join(missing)}"
        return UserError(problem, f"see {base.__module__}", option)
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
