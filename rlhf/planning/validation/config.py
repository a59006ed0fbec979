"""Validation of a step's config, all findings at once.

The constructor's signature, annotations included (``beta: Annotated[float, Field(gt=0)] = 0.1``), is the single source
of truth for hyperparameters; YAML is checked against it. This module imports no torch at module level, but the
constructors are imported, and they may import it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig

from rlhf.errors import RLHFError, UserError, UserErrors, closest
from rlhf.planning import step_config as configs
from rlhf.planning.root_config import root_config, root_keys
from rlhf.planning.validation.nodes import node_problems
from rlhf.planning.validation.stage import cross_field_problems, stage_problems
from rlhf.planning.validation.values import resolve_values, value_problems
from rlhf.stage import strategies
from rlhf.storage.plain import Plain


def validate_config(config: DictConfig | Plain, step: str = "", own: Mapping[str, Any] | None = None) -> None:
    """Validate one step's config, which is its own root.

    Args:
        config: The merged config of a single stage; plain if its values are resolved.
        step: Its name in a pipeline, put before the keys in messages so that they can be typed unchanged.
        own: Values that the pipeline sets on the step itself, the rest being the root's; None: all of them.

    Raises:
        UserError: one line for each problem, all of them at once.
    """
    prefix = f"{step}." if step else ""
    plain, errors = resolve_values(config, prefix)
    if isinstance(plain, dict):
        for key, node in plain.items():
            if key != "stage":
                errors += node_problems(node, f"{prefix}{key}")
        errors += stage_problems(plain, prefix)
        errors += _root_problems(plain, prefix)
        if isinstance(plain.get("trainer"), dict):
            found = strategies.trainer_problems(plain["trainer"])
            errors += [configs.name_in_step(x, own, step) if own and "trainer" in own else x for x in found]
        if not errors:
            errors += cross_field_problems(plain, plain if own is None else own, step)
    if errors:
        raise UserErrors(errors)


def _root_problems(config: dict[str, Any], prefix: str) -> Iterator[RLHFError]:
    """Yield problems of the root: plain values of a wrong type, and misspelt keys, which a YAML file can introduce."""
    root = root_config()
    for key, default in root.items():
        if isinstance(default, int | str) and "${" not in str(default) and key in config:
            yield from value_problems(config[key], type(default), f"{prefix}{key}")
    known = root_keys() - {"hydra"}
    for key, value in config.items():
        if key in known or isinstance(value, dict) and "_target_" in value:
            continue
        if (meant := closest(str(key), known)) is not None:
            yield UserError(f"unknown option (did you mean {prefix}{meant}?)", option=f"{prefix}{key}")
