"""Plan of a command: the steps whose results are read, in order, each validated and with its fingerprint.

Planning is a sequence of passes; each returns immutable values and leaves its arguments as they are:

1. `read_request`: expand the rounds of repeated steps, read the names of the steps.
2. `select_steps`: select the steps that are needed, each after the steps that it reads.
3. `resolve_inputs`: resolve the inputs of a step to paths and identities.
4. `validate_step`: validate its config against the constructors.
5. `fingerprint_step`: compute its fingerprint, and with it its run directory.
6. `check_step`: check what involves more than one constructor, or an earlier step.
7. `plan_comparison` and `find_unused_overrides`: validate the comparison, find overrides without effect.

Passes 3 to 6 run step by step, because the inputs of a step are run directories, which the fingerprints of earlier
steps name. Findings are collected over all passes and raised together. A single stage is a plan of one step. Planning
trains nothing, and imports no torch if all steps are finished.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf import discovery
from rlhf.errors import RLHFError, UserError, UserErrors
from rlhf.planning import step_config as configs
from rlhf.planning import validation_cache
from rlhf.planning.comparison import plan_comparison
from rlhf.planning.inputs import ResolvedStep, resolve_inputs
from rlhf.planning.request import Request, read_request
from rlhf.planning.selection import SelectedStep, select_steps, skipped_steps
from rlhf.planning.step import Plan, Step
from rlhf.planning.step_fingerprint import PlannedStep, fingerprint_step, reject_step
from rlhf.planning.unused_overrides import find_unused_overrides
from rlhf.planning.validation_cache import StepProperties
from rlhf.runs import fingerprint as fingerprints
from rlhf.runs import source_code
from rlhf.runs.run_directory import Run
from rlhf.signatures import groups
from rlhf.storage import hub
from rlhf.storage.plain import Plain, leaves

REQUIRED_GROUPS = ("model", "adapter", "precision", "trainer")  # groups that every stage needs


def plan(root: DictConfig, overrides: Sequence[str] = (), validate_again: bool = True) -> Plan:
    """Return the steps that have to run for the last step requested, in order, every config validated; train nothing.

    Args:
        root: the composed config of a single run or a pipeline.
        overrides: the typed overrides, to reject values that nothing would read.
        validate_again: whether an unfinished step is validated although the same config passed before.

    Raises:
        UserError: an unknown step, missing inputs, values out of range, an override without effect; one line each.
    """
    planned: tuple[PlannedStep, ...] = ()
    with discovery.lookup_cache.open(), source_code.sources_read_once():
        request = read_request(root, overrides)
        selected = select_steps(request)
        for step in selected:
            planned = (*planned, _build_step(step, request, planned, validate_again))
        steps = [one.step for one in planned]
        comparison = plan_comparison(request, steps)
        unused = find_unused_overrides(request, planned)
    weights = _choices_of_weights(steps)
    problems: list[RLHFError] = [
        *(problem for one in planned for problem in one.problems),
        *comparison.problems,
        *(one.error for one in unused if one.is_error),
        *(error for choice in weights if (error := choice.error) is not None),
    ]
    if problems:
        raise UserErrors(problems)
    notes = [str(one.error) for one in unused] + [choice.note for choice in weights] + recipe_notes(request)
    return Plan(steps, skipped_steps(request, selected), comparison.node, notes)


def _build_step(
    selected: SelectedStep, request: Request, planned: tuple[PlannedStep, ...], validate_again: bool
) -> PlannedStep:
    """Run the passes over one step; skip validation and checks if the step is finished and its config passed them.

    Args:
        selected: The step.
        request: The request.
        planned: The steps planned before.
        validate_again: Whether an unfinished step is validated although the same config passed before.
    """
    earlier = [one.step for one in planned]
    with configs.scope(request.root, {step.name: step.folder for step in earlier}):
        resolved = resolve_inputs(selected, request, earlier)
        key = validation_cache.key(resolved.raw, resolved.own, resolved.name or "")
        known = None if resolved.problems else validation_cache.read(key)
        built = None if known is None else fingerprint_step(resolved, known, request, planned)
        if built is not None and (not validate_again or Run(built.step.folder).finished):
            return built
        problems = (*resolved.problems, *validate_step(resolved))
        if problems:
            return reject_step(resolved, request, problems)
        properties = known or read_properties(resolved)
        built = built or fingerprint_step(resolved, properties, request, planned)
        problems = check_step(built.step, earlier)
    if not problems and known is None:
        validation_cache.write(key, properties)
    return replace(built, problems=problems)


def validate_step(resolved: ResolvedStep) -> tuple[RLHFError, ...]:
    """Return the problems of a step's config against the constructors that will read it.

    Raises:
        UserError: A group that every stage needs has no value.
    """
    from rlhf.planning.validation.config import validate_config

    for group in REQUIRED_GROUPS:
        if not isinstance(resolved.raw.get(group), dict):
            raise UserError("has no value, and every stage needs it", f"type {group}=OPTION", option=group)
    try:
        config: DictConfig | Plain = resolved.config
    except OmegaConfBaseException:  # validation names every value that cannot be resolved
        config = OmegaConf.create(resolved.raw)
    try:
        validate_config(config, resolved.name or "", resolved.own)
    except UserError as error:
        return error.findings
    return ()


def read_properties(resolved: ResolvedStep) -> StepProperties:
    """Return the properties of the classes that a validated config names; import these classes."""
    config = resolved.config
    stage = get_object(config["stage"]["_target_"])
    # Inherited groups that the stage does not read do not change its results.
    unread = {"optimizer", "scheduler"} - set(groups(stage))
    relevant = {key: value for key, value in config.items() if key not in unread}
    headline = str(getattr(stage, "headline", "") or "")
    return StepProperties(tuple(sorted(unread)), headline, fingerprints.keys_with_digest(relevant))


def check_step(step: Step, earlier: Sequence[Step]) -> tuple[RLHFError, ...]:
    """Return the problems of a step that involve more than one constructor, or the models of earlier steps."""
    from rlhf.planning.checks import adapter_layers, buildable, context_length, shared_base

    problems: list[RLHFError] = []
    for part in (buildable, adapter_layers, shared_base, context_length):
        try:
            part.check(step, earlier)
        except UserError as error:
            problems += configs.name_in_step(error, step.own, step.name).findings
    return tuple(problems)


def recipe_notes(request: Request) -> list[str]:
    """Return a note if a pipeline with a given model has the testbed's recipe, as all pipelines do by default."""
    if not request.starts_from_weights or request.root.get("recipe") != "testbed":
        return []
    problem = "has learning rates and sizes for a model of 0.9M weights, but model.path names weights"
    return [str(UserError(problem, fix="type recipe=published", option="recipe", value="testbed"))]


def _choices_of_weights(steps: Iterable[Step]) -> list[hub.Choice]:
    """Return the choices between hub and package for the models that a step of the plan starts from or reads."""
    used = {text for step in steps for key in ("model", "inputs") for text in _texts(step.config.get(key))}
    return [choice for choice in hub.chosen() if choice.path in used]


def _texts(node: Any) -> set[str]:
    return {value for _, value in leaves(node or {}) if isinstance(value, str)}
