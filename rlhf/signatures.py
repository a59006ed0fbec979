"""Parameters of constructors, read from their signatures: groups and (inherited) hyperparameters. No torch here."""

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints


def parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """Return the parameters of a constructor by name, annotations evaluated; None without a readable signature."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return None
    function = target.__init__ if inspect.isclass(target) else target  # type: ignore[misc]
    try:
        hints = get_type_hints(function, include_extras=True)
    except (NameError, AttributeError, SyntaxError, TypeError):
        # A quoted annotation that cannot be evaluated (imported for type checking only), or a target without
        # annotations (functools.partial): its parameters are not checked.
        hints = {}
    return {
        name: p.replace(annotation=hints.get(name, Any if isinstance(p.annotation, str) else p.annotation))
        for name, p in signature.parameters.items()
    }


def groups(stage: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the config groups of a stage: its positional parameters. Its hyperparameters are keyword-only."""
    found = parameters(stage) or {}
    return {name: p for name, p in found.items() if p.kind is p.POSITIONAL_OR_KEYWORD}


def merge_signature(made: type) -> inspect.Signature:
    """Return the signature that a class may be called with.

    A constructor that ends in ``**hyperparameters`` passes the ones it does not name to the next constructor in the
    method resolution order. The hyperparameters (keyword-only parameters) of that constructor are then part of the
    signature, unless the class names them itself, for example with another default.
    """
    return inspect.Signature(_parameters(list(made.__mro__)))


def _parameters(order: list[type]) -> list[inspect.Parameter]:
    while "__init__" not in vars(order[0]):
        order = order[1:]
    init = vars(order[0])["__init__"]
    own = list(inspect.signature(init).parameters.values())[1:]  # without self
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in own) or order[1:] == [object]:
        return own
    own = [parameter for parameter in own if parameter.kind is not parameter.VAR_KEYWORD]
    named = {parameter.name for parameter in own}
    below = _parameters(order[1:])
    return own + [p for p in below if p.name not in named and p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD)]
