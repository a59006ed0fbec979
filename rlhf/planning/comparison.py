"""Comparison at the end of a pipeline: its ``compare`` group, resolved and validated.

This module imports no torch at module level, and none for a comparison that passed validation before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import OmegaConf

from rlhf.data.sources import TESTBED
from rlhf.errors import RLHFError, UserError, key, suggest
from rlhf.planning import comparison_file, validation_cache
from rlhf.planning import step_config as configs
from rlhf.planning.request import Request
from rlhf.planning.step import Step
from rlhf.planning.validation_cache import StepProperties
from rlhf.storage.plain import Plain

_STEPS = ("before", "after", "reward_model")  # keys whose values are steps
_GIVEN = (*_STEPS, "prompts", "text", "folder")  # parameters that are no hyperparameters of a comparison


@dataclass(frozen=True)
class PlannedComparison:
    """Comparison of two policies of the plan.

    Attributes:
        node: the ``compare`` group, resolved; None if one of its two policies is not made.
        problems: findings.
    """

    node: Plain | None
    problems: tuple[RLHFError, ...] = ()


def plan_comparison(request: Request, steps: Sequence[Step]) -> PlannedComparison:
    """Resolve and validate the pipeline's ``compare`` group.

    Args:
        request: The request.
        steps: The steps of the plan.
    """
    node = request.root.get("compare")
    if node is None or not request.names:
        return PlannedComparison(None)
    own = configs.resolve({"compare": OmegaConf.to_container(node), "recipe": request.root.get("recipe")})["compare"]
    folders = {step.name: str(step.folder) for step in steps}
    are_made = all(own.get(key) in folders for key in ("before", "after"))
    key = validation_cache.key({"compare": own}, {"steps": list(request.names), "folders": folders}, "compare")
    is_new = validation_cache.read(key) is None
    problems = _validate(own, request, steps, are_made) if is_new else []
    if not problems and are_made:
        try:
            comparison_file.data_digests(own)
        except UserError as error:
            problems = list(error.findings)
    if not problems and is_new:
        validation_cache.write(key, StepProperties())
    return PlannedComparison(own if are_made else None, tuple(problems))


def _validate(own: Plain, request: Request, steps: Sequence[Step], are_made: bool) -> list[RLHFError]:
    from rlhf.evaluation.compare import compare
    from rlhf.planning.checks import context_length
    from rlhf.planning.validation.config import validate_config
    from rlhf.planning.validation.nodes import check_node

    problems: list[RLHFError] = [
        UserError(f"no such step{suggest(str(own[key]), request.names)}", option=f"compare.{key}", value=own[key])
        for key in _STEPS
        if own.get(key) is not None and own[key] not in request.names
    ]
    problems += check_node(compare, own, "compare", given=_GIVEN, ignore=(*_GIVEN, "data"))
    for data in ("data", *(["text"] if own.get("text") else [])):
        try:
            validate_config(OmegaConf.create({data: own.get(data)}), "compare")
        except UserError as error:
            problems += error.findings
    scored = own.get("reward_model") in {step.name for step in steps} or own["data"].get("source") == TESTBED
    if are_made and not problems and own.get("best_of", 1) > 1 and not scored:
        fix = f"type {key('compare.reward_model', 'STEP')} or {key('compare.best_of', 1)}"
        problems.append(
            UserError("needs a score that chooses the best", fix=fix, option="compare.best_of", value=own["best_of"])
        )
    if are_made:
        try:
            context_length.check_comparison(own, steps)
        except UserError as error:
            problems += error.findings
    return problems
