"""Check that the responses of a step leave space for a prompt in the model's context, before the first step runs.

A step of a pipeline usually samples from a model that an earlier step has not made yet. That model has the shape of the
one it started from, so its context length is known from configs alone. This module imports no torch at module level.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rlhf.errors import UserError, key
from rlhf.models.saved_config import read_config, replace_published
from rlhf.planning.instantiate import instantiate_cheap
from rlhf.storage.plain import Plain

if TYPE_CHECKING:
    from rlhf.planning.step import Step

_KEYS = ("max_position_embeddings", "n_positions")  # names of the context length in the model families


def length(model: Any, steps: Iterable["Step"] = ()) -> int | None:
    """Return the context length of a model in tokens; None if it is unknown before loading, as for other hub models.

    Args:
        model: The ``model`` group, resolved.
        steps: Steps of the same plan, which may make the model later.
    """
    return size(model, steps, _KEYS)


def size(model: Any, steps: Iterable["Step"], names: Iterable[str]) -> int | None:
    """Return an integer of a model's configuration, under the first of ``names`` that it has; None if it is unknown.

    Args:
        model: The ``model`` group, resolved.
        steps: Steps of the same plan, which may make the model later.
        names: Names of the integer in the model families.
    """
    made = {str(step.folder / "model"): step.config.get("model") for step in steps}
    while isinstance(model, dict) and model.get("path") in made:
        model = made.pop(model["path"])
    if not isinstance(model, dict):
        return None
    model = replace_published(model)
    shape = model.get("architecture") if model.get("path") is None else read_config(model["path"])
    found = [shape[name] for name in names if isinstance(shape, dict) and type(shape.get(name)) is int]
    return found[0] if found else None


def check(step: "Step", earlier: Iterable["Step"]) -> None:
    """Raise for a step whose responses would fill the context of the model that generates them.

    Args:
        step: A step that is to run.
        earlier: Steps of the same plan, whose models it may read before they are made.

    Raises:
        UserError: One line.
    """
    from rlhf.sampler.base import Sampler

    node, context = step.config.get("sampler"), length(step.config.get("model"), earlier)
    if isinstance(node, dict) and context is not None:
        sampler = instantiate_cheap(node)
        if isinstance(sampler, Sampler):
            sampler.check_context(context)


def check_comparison(node: Plain, steps: Iterable["Step"]) -> None:
    """Raise if the responses of a pipeline's ``compare`` would fill the context of one of the compared policies.

    Args:
        node: The ``compare`` group, resolved.
        steps: Steps of the plan.

    Raises:
        UserError: One line.
    """
    steps, longest = list(steps), node.get("max_new_tokens")
    for step in steps:
        context = length(step.config.get("model"), steps) if step.name in (node["before"], node["after"]) else None
        if context is not None and type(longest) is int and longest >= context:
            raise UserError(
                f"leaves no room for a prompt in the context of {context} tokens of {step.name}",
                fix=f"type {key('compare.max_new_tokens', context // 2)}, or any number below {context}",
                option="compare.max_new_tokens",
                value=longest,
            )
