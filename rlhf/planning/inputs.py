"""Inputs of a step: the roles that it reads, resolved to paths, identities and the runs that they come from.

This module imports no torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf.errors import RLHFError, UserError, key
from rlhf.planning import model_options, references
from rlhf.planning import step_config as configs
from rlhf.planning.references import Reference
from rlhf.planning.request import Request
from rlhf.planning.selection import SelectedStep
from rlhf.planning.step import Step
from rlhf.runs.run_directory import Run
from rlhf.storage.plain import Plain


@dataclass(frozen=True)
class ResolvedStep:
    """Step with its inputs resolved.

    Attributes:
        name: its name in the pipeline; None for a single run.
        raw: its config, its own root, with the paths of its inputs; other interpolations are unresolved.
        own: values that the pipeline sets on the step itself.
        roles: the roles that it reads.
        roles_of_root: those of them whose value is given at the root.
        identities: role -> identities of the inputs in that role, for the fingerprint.
        parents: fingerprint -> run directory of the runs that it reads.
        problems: findings.
    """

    name: str | None
    raw: Plain
    own: Plain
    roles: frozenset[str]
    roles_of_root: frozenset[str]
    identities: Mapping[str, list[str]]
    parents: Mapping[str, Path]
    problems: tuple[RLHFError, ...]

    @cached_property
    def config(self) -> Plain:
        """Return the config with every interpolation replaced by its value, resolved once.

        Raises:
            OmegaConfBaseException: A value cannot be resolved.
        """
        return configs.resolve(self.raw)


def resolve_inputs(step: SelectedStep, request: Request, earlier: Sequence[Step]) -> ResolvedStep:
    """Resolve the inputs that a step reads.

    A required input without a value becomes a finding and the path "RUN", and a value that matches nothing a finding
    and the value itself, so that the rest of the config can still be validated.

    Args:
        step: The step.
        request: The request, whose inputs at the root a step falls back to.
        earlier: The steps planned before, whose run directories need not exist yet.
    """
    raw = step.raw
    values = configs.resolve({**raw, **{key: None for key in raw if key != "inputs"}})["inputs"]
    required = configs.required_roles(raw)
    prefix = f"{step.name}." if step.name else ""
    paths: Plain = {}
    identities: dict[str, list[str]] = {}
    parents: dict[str, Path] = {}
    roles_of_root: set[str] = set()
    problems: list[RLHFError] = []
    for role in sorted(step.roles):
        value, option = values.get(role), f"{prefix}inputs.{role}"
        if value is None or value == request.inputs.get(role):
            value, option = request.inputs.get(role), f"inputs.{role}"
        if value is None:
            if role in required:
                option = f"{prefix}inputs.{role}"
                suggestion = key(option, _suggest_value(role, request.overrides))
                problem = f"has no value, and {key(f'{prefix}{required[role]}')} reads it"
                problems.append(UserError(problem, fix=f"type {suggestion}", option=option))
                paths[role] = "RUN"
            continue
        if value == request.inputs.get(role):
            roles_of_root.add(role)
        found, wrong = _resolve_values(value, role, option, request.outputs, earlier)
        problems += wrong
        paths[role] = [one.path for one in found] if isinstance(value, list) else found[0].path
        identities[role] = [one.identity for one in found]
        parents |= {_fingerprint(one.run, earlier): one.run for one in found if one.run is not None}
    return ResolvedStep(
        name=step.name,
        raw={**raw, "inputs": raw["inputs"] | paths},
        own=request.own(step.name),
        roles=step.roles,
        roles_of_root=frozenset(roles_of_root),
        identities=identities,
        parents=parents,
        problems=tuple(problems),
    )


def _resolve_values(
    value: Any, role: str, option: str, outputs: Path, earlier: Sequence[Step]
) -> tuple[list[Reference], list[RLHFError]]:
    """Return the references of a value, which may be a list, and the findings."""
    found: list[Reference] = []
    problems: list[RLHFError] = []
    for one in value if isinstance(value, list) else [value]:
        try:
            found.append(_resolve_value(str(one), role, option, outputs, earlier))
        except UserError as error:
            problems += error.findings
            found.append(Reference(str(one), ""))
    return found, problems


def _resolve_value(value: str, role: str, option: str, outputs: Path, earlier: Iterable[Step]) -> Reference:
    for step in earlier:
        if value == str(step.folder):  # this directory need not exist yet
            return Reference(references.input_path(step.folder, role), step.fingerprint, step.folder)
    return references.resolve(value, role, outputs, option)


def _fingerprint(run: Path, earlier: Iterable[Step]) -> str:
    """Return the fingerprint of a run directory, which may be that of an earlier step of the plan."""
    step = next((step for step in earlier if step.folder == run), None)
    return step.fingerprint if step else Run(run).fingerprint


def _suggest_value(role: str, overrides: Iterable[str]) -> str:
    """Return the suggested value for an input that is not given."""
    model = next((word.removeprefix("model=") for word in overrides if word.startswith("model=")), "")
    if role == "policy" and model in model_options.with_weights():
        return f"{model} to start from the weights of model={model}, or RUN (a run directory or a fingerprint)"
    return "RUN (a run directory, a fingerprint, a model directory or a hub id)"
