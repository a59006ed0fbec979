"""Parameters of constructors, read from their signatures: groups and (inherited) hyperparameters. No torch here."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, get_type_hints

from rlhf.errors import suggest


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
    signature, with the class's ``defaults`` as their default values, and without the names in its ``fixed``.

    Raises:
        TypeError: ``defaults`` or ``fixed`` names something else than a hyperparameter of a base class.
    """
    return inspect.Signature(_parameters(list(made.__mro__)))


def apply_defaults(made: type) -> None:
    """Make the constructor of a class use the class's ``defaults`` for the hyperparameters that the caller omits.

    It is then the same as a constructor that names these hyperparameters and passes them on.
    """
    defaults: Mapping[str, Any] = vars(made).get("defaults", {})
    if not defaults:
        return
    own = vars(made).get("__init__")

    @functools.wraps(made.__init__)  # type: ignore[misc]
    def constructor(self: Any, *groups: Any, **hyperparameters: Any) -> None:
        call = super(made, self).__init__ if own is None else functools.partial(own, self)  # type: ignore[arg-type]
        call(*groups, **{**defaults, **hyperparameters})

    constructor.own = own  # type: ignore[attr-defined]
    made.__init__ = constructor  # type: ignore[misc]


def _parameters(order: list[type]) -> list[inspect.Parameter]:
    made, bases = order[0], order[1:]
    constructor = vars(made).get("__init__")
    constructor = getattr(constructor, "own", constructor)  # set by apply_defaults
    own: list[inspect.Parameter] = []
    inherited: list[inspect.Parameter] = []
    if constructor is None:
        inherited = _parameters(bases)
    else:
        own = list(inspect.signature(constructor).parameters.values())[1:]  # without self
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in own) and bases != [object]:
            own = [parameter for parameter in own if parameter.kind is not parameter.VAR_KEYWORD]
            named = {parameter.name for parameter in own}
            found = (p for p in _parameters(bases) if p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD))
            inherited = [parameter for parameter in found if parameter.name not in named]
    known = [parameter.name for parameter in inherited if parameter.kind is parameter.KEYWORD_ONLY]
    defaults: Mapping[str, Any] = vars(made).get("defaults", {})
    fixed: Collection[str] = vars(made).get("fixed", ())
    for name in (*defaults, *fixed):
        if name not in known:
            attribute = "defaults" if name in defaults else "fixed"
            hint = suggest(name, known)
            raise TypeError(f"{made.__name__}.{attribute}: {name} is not a hyperparameter of a base class{hint}")
    changed = (p.replace(default=defaults[p.name]) if p.name in defaults else p for p in inherited)
    return own + [parameter for parameter in changed if parameter.name not in fixed]
