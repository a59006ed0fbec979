"""What constructors can be given, read off their signatures: groups, knobs, and knobs handed on. No torch here."""

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints


def parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """Parameters of a constructor by name, annotations evaluated; None when it has no readable signature."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return None
    function = target.__init__ if inspect.isclass(target) else target  # type: ignore[misc]
    try:
        hints = get_type_hints(function, include_extras=True)
    except (NameError, AttributeError, SyntaxError, TypeError):
        # An annotation in quotes that cannot be evaluated, such as one that names something imported for type checking
        # only, or a target that has none (functools.partial): those parameters go unchecked.
        hints = {}
    return {
        name: p.replace(annotation=hints.get(name, Any if isinstance(p.annotation, str) else p.annotation))
        for name, p in signature.parameters.items()
    }


def groups(stage: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The config groups that a stage asks for: its positional parameters. Its own knobs are keyword-only."""
    found = parameters(stage) or {}
    return {name: p for name, p in found.items() if p.kind is p.POSITIONAL_OR_KEYWORD}


def signature_of(made: type) -> inspect.Signature:
    """What a class may be called with.

    A constructor that ends in ``**knobs`` hands what it does not name to the next one in the method resolution order;
    its knobs (keyword-only parameters) are then the class's own too, unless the class names them itself, with a default
    of its own, say.
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
