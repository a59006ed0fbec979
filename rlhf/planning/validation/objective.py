"""Check of the objective: whether the stage takes its class."""

import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from omegaconf import OmegaConf

from rlhf import discovery
from rlhf.errors import UserError, key
from rlhf.planning.instantiate import load_target


def objective_problems(
    config: dict[str, Any], parameter: inspect.Parameter | None, stage: str, step: str
) -> Iterator[UserError]:
    """Yield a problem if the objective is not of a class that the stage takes, because Hydra composes any pair."""
    node = config.get("objective")
    if parameter is None or not isinstance(node, dict) or "_target_" not in node:
        return
    wanted = annotated_classes(parameter.annotation)
    target = load_target(node["_target_"])
    if not wanted or not inspect.isclass(target) or issubclass(target, wanted):
        return
    offered = dict(objective_options())
    chosen = next((o for o, t in offered.items() if t == node["_target_"]), target.__name__)
    fitting = [o for o, t in offered.items() if inspect.isclass(c := load_target(t)) and issubclass(c, wanted)]
    objective = f"objective@{step}.objective" if step else "objective"
    takes = ", ".join(sorted(fitting)) or "no installed option"
    yield UserError(f"stage={stage} does not take {key(objective, chosen)}", fix=f"it takes: {takes}")


def annotated_classes(annotation: Any) -> tuple[type, ...]:
    """Return the classes of an annotation, with unions split; empty if it constrains nothing."""
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(c for part in get_args(annotation) for c in annotated_classes(part) if c is not type(None))
    origin = get_origin(annotation) or annotation
    if not inspect.isclass(origin) or origin is object:
        return ()
    return (origin,)


def objective_options() -> Iterator[tuple[str, str]]:
    """Yield (name, ``_target_``) of every objective option."""
    for path in discovery.named("objective"):
        target = OmegaConf.select(OmegaConf.load(path), "_target_")
        if target:
            yield path.stem, target
