"""Selection of the steps that a command needs: the last one, and before it every step that it reads.

Selection reads raw configs alone: which steps a step reads follows from its references, whatever their values are. This
module imports no torch.
"""

from dataclasses import dataclass

from rlhf.errors import UserError, suggest
from rlhf.planning import step_config as configs
from rlhf.planning.request import Request
from rlhf.storage.plain import Plain


@dataclass(frozen=True)
class SelectedStep:
    """Step that is planned.

    Attributes:
        name: its name in the pipeline; None for a single run.
        raw: its config, its own root, interpolations unresolved. Inputs that the step does not read are null.
        roles: the roles that it reads.
    """

    name: str | None
    raw: Plain
    roles: frozenset[str]


def select_steps(request: Request) -> tuple[SelectedStep, ...]:
    """Return the steps to plan, each after every step that it reads.

    Raises:
        UserError: A step reads a step that does not exist, or the steps read each other in a circle.
    """
    return _select(request, request.last, (), ())


def _select(
    request: Request, name: str | None, selected: tuple[SelectedStep, ...], readers: tuple[str | None, ...]
) -> tuple[SelectedStep, ...]:
    """Return the selection with a step appended, after the steps that it reads.

    Args:
        request: The request.
        name: The step to append, unless it is selected already.
        selected: The selection so far.
        readers: The steps on the path from the last step to this one.
    """
    if any(step.name == name for step in selected):
        return selected
    if name in readers:
        raise UserError(f"the steps read each other in a circle, at {name}", fix=f"change {name}.inputs")
    raw = configs.step_config(request.raw, name)
    roles = configs.roles_read(raw)
    # An input that is not read is not resolved, does not enter the fingerprint, and makes no step necessary.
    raw["inputs"] = {role: value if role in roles else None for role, value in (raw.get("inputs") or {}).items()}
    for resolver, needed in configs.steps_named(raw):
        if resolver != "artifact" and request.starts_from_weights:
            continue
        if needed not in request.names:
            hint = suggest(needed, request.names)
            raise UserError(f"{name or 'the config'} reads the step {needed}, which does not exist{hint}")
        selected = _select(request, needed, selected, (*readers, name))
    return (*selected, SelectedStep(name, raw, frozenset(roles)))


def skipped_steps(request: Request, selected: tuple[SelectedStep, ...]) -> dict[str, str]:
    """Return step -> reason for the steps of the pipeline that are left out."""
    names, chosen = request.names, {step.name for step in selected}
    reasons = {}
    for name in names:
        if name in chosen:
            continue
        if request.last is not None and names.index(name) > names.index(request.last):
            reasons[name] = f"after until={request.last}"
        elif request.starts_from_weights and name == names[0]:
            reasons[name] = "not needed, the model has weights"
        else:
            reasons[name] = "not needed, no step that runs reads it"
    return reasons
