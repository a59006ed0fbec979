"""Overrides without effect: typed values that no step of the plan reads. This module imports no torch."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlhf.errors import UserError, override_error
from rlhf.planning.request import Request
from rlhf.planning.root_config import root_keys
from rlhf.planning.step_fingerprint import PlannedStep
from rlhf.storage.plain import leaves, sets


@dataclass(frozen=True)
class UnusedOverride:
    """Override without effect.

    Attributes:
        error: the override, the reason and what to type.
        is_error: whether nothing can read the value; otherwise the step that reads it does not run.
    """

    error: UserError
    is_error: bool = True


def find_unused_overrides(request: Request, planned: Sequence[PlannedStep]) -> tuple[UnusedOverride, ...]:
    """Return the typed overrides that have no effect on the planned steps, in the order in which they were typed."""
    return tuple(
        found for typed in request.overrides if (found := _unused_override(typed, request, planned)) is not None
    )


def _unused_override(typed: str, request: Request, planned: Sequence[PlannedStep]) -> UnusedOverride | None:
    key, _, value = typed.lstrip("+").partition("=")
    if typed.startswith("+") and "@" not in key and (unread := _unread_key(request, key)):
        return _no_effect(typed, f"nothing reads {unread}", "leave it out")
    if typed.startswith("~") or "@" in key or value in ("null", ""):
        return None
    first, _, rest = key.partition(".")
    if first in request.rounds or first in request.names:
        # An override of a repeated step sets all its rounds; it has an effect if any of them reads it.
        names = request.rounds.get(first, [first])
        meant = [one for name in names for one in planned if one.step.name == name]
        if not meant:
            return UnusedOverride(
                override_error(typed, f"is not used, because the step {first} does not run"), is_error=False
            )
        found = _reason_for_step(first, rest, meant)
    elif first == "inputs" and rest:
        found = _reason_for_input(key, rest, request, planned)
    else:
        found = _reason_for_root_key(key, request, planned)
    return None if found is None else _no_effect(typed, *found)


def _no_effect(typed: str, reason: str, fix: str) -> UnusedOverride:
    return UnusedOverride(override_error(typed, f"has no effect, because {reason}", fix))


def _reason_for_step(step: str, key: str, meant: Sequence[PlannedStep]) -> tuple[str, str] | None:
    """Return why a value that is set on a step has no effect, and what to type; None if it has one.

    Args:
        step: The step as typed.
        key: The key below the step.
        meant: The step, or all its rounds if it is repeated.
    """
    group = key.partition(".")[0]
    if all(group in one.unread for one in meant):
        return f"the stage of {step} does not read {group}", "leave it out"
    if key.startswith("inputs.") and all(key.removeprefix("inputs.") not in one.roles for one in meant):
        # The steps of a repeated step have one stage, so that the first speaks for all.
        return _describe_roles(meant[0]), "leave it out"
    return None


def _reason_for_input(key: str, role: str, request: Request, planned: Sequence[PlannedStep]) -> tuple[str, str] | None:
    """Return why an input given at the root has no effect, and what to type; None if it has one."""
    if any(role in (one.roles_of_root if request.names else one.roles) for one in planned):
        return None
    keys = [f"{one.step.name}.{key}" for one in planned if request.names and role in one.roles]
    if keys:
        return "every step that reads it sets its own", f"type {' or '.join(keys)}"
    return " and ".join(dict.fromkeys(_describe_roles(one) for one in planned)), "leave it out"


def _reason_for_root_key(key: str, request: Request, planned: Sequence[PlannedStep]) -> tuple[str, str] | None:
    """Return why a value set at the root has no effect, and what to type; None if it has one."""
    group = key.partition(".")[0]
    readers = [one.step.name for one in planned if group not in one.unread]
    if not readers:
        return f"no stage of this run reads {group}", "leave it out"
    if request.names and all(sets(request.raw[name], key) for name in readers):
        return "every step sets its own", f"type one of {', '.join(f'{name}.{key}' for name in readers)}"
    return None


def _unread_key(request: Request, typed: str) -> str | None:
    """Return the key that a ``+`` override adds to the root of a config, or of a step's config, and that nothing reads.

    Such a key is no group, no step and no object, and no interpolation names it. None if the key is read.
    """
    step, _, below = typed.partition(".")
    if below and (step in request.rounds or step in request.names):  # a step's config is its own root
        name = request.rounds.get(step, [step])[0]
        key, path, own, known = below.partition(".")[0], f"{step}.", request.raw[name], root_keys()
    else:
        key, path, own = step, "", request.raw
        known = {*root_keys(), *request.rounds, *request.names, "compare", "repeat", "rounds"}
    added = own.get(key)
    if key in known or isinstance(added, dict) and "_target_" in added:
        return None
    mention = re.compile(r"\$\{" + re.escape(key) + r"[.}\[]")
    return None if any(mention.search(text) for text in _texts(request)) else f"{path}{key}"


def _texts(request: Request) -> Iterator[str]:
    return (value for _, value in leaves(request.raw) if isinstance(value, str))


def _describe_roles(planned: PlannedStep) -> str:
    inputs = ", ".join(f"inputs.{role}" for role in sorted(planned.roles))
    return f"stage={planned.step.stage} reads {f'only {inputs}' if inputs else 'no input'}"
