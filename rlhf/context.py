"""The context of the models of a plan, told by their configs: replies that fill it are refused before the first step.

A step of a pipeline mostly samples from a model that an earlier step has yet to make. That one has the shape it started
from, so its context is known long before its weights. No torch at module level.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rlhf.config import Plain
from rlhf.errors import UserError
from rlhf.model_config import written
from rlhf.validation import light

if TYPE_CHECKING:
    from rlhf.plan import Step

_KEYS = ("max_position_embeddings", "n_positions")  # what families call it


def length(model: Any, steps: Iterable["Step"] = ()) -> int | None:
    """Return the most tokens that a model reads; None where that is not known before it is loaded (of the hub, say).

    Args:
        model: What ``conf/model`` says of it, resolved.
        steps: Of the same plan, which may have yet to make it.
    """
    return size(model, steps, _KEYS)


def size(model: Any, steps: Iterable["Step"], keys: Iterable[str]) -> int | None:
    """Return a whole number of a model's configuration, under the first of these keys that it has; None as `length`."""
    made = {str(step.folder / "model"): step.config.get("model") for step in steps}
    while isinstance(model, dict) and model.get("path") in made:
        model = made.pop(model["path"])
    if not isinstance(model, dict):
        return None
    shape = model.get("architecture") if model.get("path") is None else written(model["path"])
    found = [shape[key] for key in keys if isinstance(shape, dict) and type(shape.get(key)) is int]
    return found[0] if found else None


def check(step: "Step", earlier: Iterable["Step"]) -> None:
    """Refuses a step whose replies would fill the context of the model that writes them.

    Args:
        step: One that is to run.
        earlier: Steps of the same plan, whose models it may read before they are made.

    Raises:
        UserError: One line.
    """
    rollout, context = step.config.get("rollout"), length(step.config.get("model"), earlier)
    if isinstance(rollout, dict) and context is not None:
        sampler: Any = light(rollout)
        if hasattr(sampler, "check_context"):
            sampler.check_context(context)


def check_comparison(node: Plain, steps: Iterable["Step"]) -> None:
    """As ``check``, of a pipeline's ``compare``, resolved, and the steps whose policies it compares."""
    steps, longest = list(steps), node.get("max_new_tokens")
    for step in steps:
        context = length(step.config.get("model"), steps) if step.name in (node["before"], node["after"]) else None
        if context is not None and type(longest) is int and longest >= context:
            raise UserError(
                f"compare.max_new_tokens={longest} leaves no room for a prompt in the context of {context} tokens of "
                f"{step.name}: type compare.max_new_tokens={context // 2}, or any number below {context}"
            )
