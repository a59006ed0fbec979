"""Checks of single values against the annotations of constructors."""

import inspect
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, ValidationError, create_model
from pydantic.errors import PydanticUserError

from rlhf.errors import RLHFError, UserError, first_line, key
from rlhf.storage.plain import Plain

# No hyperparameter is valid at infinity or nan, but infinity passes bounds such as greater than 0.
_FINITE = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
LARGEST, SMALLEST = 3.4e38, 1.2e-38  # range of float32; smaller values lose digits, then become 0
# Building a model takes milliseconds, and a pipeline checks thousands of values. An Annotated with a Field has no hash,
# and two of equal text are not equal: repr -> [(annotation, model)].
_MODELS: dict[str, list[tuple[Any, Any]]] = {}


def resolve_values(config: DictConfig | Plain, prefix: str) -> tuple[Any, list[RLHFError]]:
    """Return the config as plain containers, and the errors; values that do not resolve become `UNRESOLVED`."""
    errors: list[RLHFError] = []

    def plain(node: Any, path: str) -> Any:
        if isinstance(node, dict) or OmegaConf.is_dict(node):
            return {k: child(node, k, f"{path}.{k}" if path else str(k)) for k in node}
        if isinstance(node, list) or OmegaConf.is_list(node):
            return [child(node, i, f"{path}[{i}]") for i in range(len(node))]
        return node

    def child(parent: Any, name: Any, path: str) -> Any:
        is_plain = isinstance(parent, dict | list)
        if parent[name] == MISSING if is_plain else OmegaConf.is_missing(parent, name):
            errors.append(UserError("has no value", fix=f"type {key(prefix + path, '...')}", option=prefix + path))
            return UNRESOLVED
        try:
            return plain(parent[name], path)
        except OmegaConfBaseException as e:  # OmegaConf wraps whatever a resolver raises
            errors.append(UserError(first_line(e), option=prefix + path))
        return UNRESOLVED

    return plain(config, ""), errors


class _Unresolved:
    """Placeholder for a value that is missing or did not resolve: already reported, so accepted everywhere."""


UNRESOLVED = _Unresolved()


def holds_object(value: Any) -> bool:
    """Return whether a value contains a node that builds an object, or did not resolve."""
    if isinstance(value, dict):
        return "_target_" in value or any(holds_object(v) for v in value.values())
    if isinstance(value, list):
        return any(holds_object(v) for v in value)
    return value is UNRESOLVED


def value_problems(value: Any, annotation: Any, path: str) -> list[RLHFError]:
    """Return the problems of a value against the annotation of its parameter: type, range and choices.

    Args:
        value: The value.
        annotation: The parameter's annotation.
        path: The key, for messages.
    """
    if annotation in (inspect.Parameter.empty, Any) or holds_object(value):
        return []
    model = _value_model(annotation)
    if model is None:
        return []
    try:
        checked = model(value=value).value
    except ValidationError as e:
        # pydantic reports every member of a union; equal messages are merged, and the first location is shown. Its
        # messages start with "Input", which the config key before them replaces.
        messages = list(dict.fromkeys(str(x["msg"]).replace("Input should", "should") for x in e.errors()))
        inner = [".".join(str(part) for part in x["loc"][1:] if isinstance(part, int)) for x in e.errors()]
        where = path + (f"[{inner[0]}]" if inner[0] else "")
        return [UserError(" or ".join(messages), option=where, value=value)]
    if isinstance(checked, float) and abs(checked) > LARGEST:
        return [UserError("is too large for a float32", fix="type a smaller number", option=path, value=value)]
    if isinstance(checked, float) and 0 < abs(checked) < SMALLEST:
        return [UserError("is too small for a float32", fix="type 0 or a larger number", option=path, value=value)]
    is_converted = type(checked) is not type(value) and not (type(value) is int and type(checked) is float)
    if is_converted and _is_scalar(checked) and _is_scalar(value):
        # pydantic would convert the value, but the constructor gets it unconverted.
        problem = f"should be of type {type(checked).__name__}, not {type(value).__name__}"
        return [UserError(problem, option=path, value=value)]
    return []


def _value_model(annotation: Any) -> Any:
    """Return the pydantic model of one value of this type; None for a type that pydantic does not know."""
    known = _MODELS.setdefault(repr(annotation), [])
    for other, model in known:
        if other == annotation:
            return model
    try:
        made: Any = create_model("Value", __config__=_FINITE, value=(annotation, ...))
    except PydanticUserError:
        made = None
    known.append((annotation, made))
    return made


def _is_scalar(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)
