"""Fingerprint of a validated step, with its round, its branch and its run directory. This module imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.errors import RLHFError, UserError
from rlhf.planning import step_config as configs
from rlhf.planning.inputs import ResolvedStep
from rlhf.planning.request import Request, validate_path_name
from rlhf.planning.step import Step
from rlhf.planning.validation_cache import StepProperties
from rlhf.runs import fingerprint as fingerprints
from rlhf.runs.run_directory import LETTERS, Run
from rlhf.storage.plain import Plain


@dataclass(frozen=True)
class PlannedStep:
    """Step of the plan, with what later passes need to know of it.

    Attributes:
        step: the step; its fingerprint is "" if there are findings that prevent one.
        roles: the roles that it reads.
        roles_of_root: those of them whose value is given at the root.
        unread: the shared groups that its stage does not read.
        lineage: fingerprint -> stage of the runs that it descends from and its own; empty without a fingerprint.
        problems: findings.
    """

    step: Step
    roles: frozenset[str]
    roles_of_root: frozenset[str]
    unread: frozenset[str]
    lineage: Mapping[str, str]
    problems: tuple[RLHFError, ...]


def fingerprint_step(
    resolved: ResolvedStep, properties: StepProperties, request: Request, planned: Sequence[PlannedStep]
) -> PlannedStep:
    """Return the step with its fingerprint and run directory.

    Args:
        resolved: The step, whose config passed validation.
        properties: Properties of the classes that its config names.
        request: The request.
        planned: The steps planned before.

    Raises:
        UserError: The data of the step cannot be read, or its stage has a name that cannot be that of a directory.
    """
    config = resolved.config
    stage, name = stage_name(config), resolved.name
    validate_path_name(f"{name}.stage.name" if name else "stage.name", stage)
    config = {key: value for key, value in config.items() if key not in properties.unread}
    parents = {**resolved.parents, **_named_parents(resolved.raw, planned)}
    ancestors = _ancestors(parents, planned)
    config["round"] = 1 + list(ancestors.values()).count(stage)
    if (branch := 1 + _count_branches(name, stage, ancestors, request, planned)) > 1:
        config["branch"] = branch
    folders = {str(folder): fingerprint for fingerprint, folder in parents.items()}
    try:
        fingerprint = fingerprints.compute(config, resolved.identities, folders, properties.digests)
    except UserError as error:
        raise configs.name_in_step(error, resolved.own, name or "") from None
    step = Step(
        name=name or stage,
        stage=stage,
        config=config,
        fingerprint=fingerprint,
        folder=request.outputs / stage / fingerprint[:LETTERS],
        inputs=dict(resolved.identities),
        parents=parents,
        headline=properties.headline,
        own=resolved.own,
    )
    lineage = {**ancestors, fingerprint: stage}
    return PlannedStep(step, resolved.roles, resolved.roles_of_root, frozenset(properties.unread), lineage, ())


def reject_step(resolved: ResolvedStep, request: Request, problems: tuple[RLHFError, ...]) -> PlannedStep:
    """Return a step that has no fingerprint because of its problems, so that planning continues to find more."""
    stage = stage_name(resolved.raw)
    name = resolved.name or stage
    step = Step(
        name=name,
        stage=stage,
        config=resolved.raw,
        fingerprint="",
        folder=request.outputs / stage / f"({name})",
        inputs=dict(resolved.identities),
        parents=dict(resolved.parents),
        headline="",
        own=resolved.own,
    )
    return PlannedStep(step, resolved.roles, resolved.roles_of_root, frozenset(), {}, problems)


def stage_name(config: Plain) -> str:
    """Return the name of a config's stage: ``stage.name``, else the name of the plugin that its class is in."""
    stage = config["stage"] if isinstance(config["stage"], dict) else {}
    return str(stage.get("name") or str(stage.get("_target_", "stage")).partition(".")[0].removeprefix("rlhf_"))


def _named_parents(raw: Plain, planned: Sequence[PlannedStep]) -> dict[str, Path]:
    """Return fingerprint -> run directory of the planned steps that a config names outside of its inputs."""
    steps = {one.step.name: one.step for one in planned}
    named = configs.steps_named({key: value for key, value in raw.items() if key != "inputs"})
    return {steps[name].fingerprint: steps[name].folder for _, name in named if name in steps}


def _ancestors(parents: Mapping[str, Path], planned: Sequence[PlannedStep]) -> dict[str, str]:
    """Return fingerprint -> stage of every run that these runs descend from, themselves included."""
    lineages = {one.step.fingerprint: one.lineage for one in planned if one.lineage}
    found: dict[str, str] = {}
    for fingerprint, folder in parents.items():
        if fingerprint in lineages:
            found |= lineages[fingerprint]
        else:
            lineage = Run(folder).lineage
            earlier = lineage.get("ancestors") or {}
            found |= {name: str(run.get("stage")) for name, run in earlier.items()}
            found[fingerprint] = str(lineage.get("stage") or folder.parent.name)
    return found


def _count_branches(
    name: str | None, stage: str, ancestors: Mapping[str, str], request: Request, planned: Sequence[PlannedStep]
) -> int:
    """Return how many earlier steps of the pipeline have the same stage and are not ancestors of this one."""
    if name is None:
        return 0
    before = [one for one in request.names[: request.names.index(name)] if stage_name(request.raw[one]) == stage]
    fingerprints_by_name = {one.step.name: one.step.fingerprint for one in planned}
    return sum(fingerprints_by_name.get(one) not in ancestors for one in before)
