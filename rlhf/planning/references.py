"""References to runs and models, as typed for an input, and their resolution. This module imports no torch."""

import re
from dataclasses import dataclass
from pathlib import Path

from rlhf.errors import UserError, suggest
from rlhf.planning import model_options
from rlhf.runs.fingerprint import identity
from rlhf.runs.run_directory import Run, find, run_of

MODEL_ROLES = ("policy", "base", "reference", "reward_model", "safety_model", "value", "judge")
SCORE_ROLES = ("reward_model", "safety_model")


@dataclass(frozen=True)
class Reference:
    """Resolved input: the path or hub id that a stage reads, and the identity that enters the fingerprint."""

    path: str
    identity: str
    run: Path | None = None  # the run directory it comes from


def resolve(ref: str, role: str, outputs: Path, option: str | None = None) -> Reference:
    """Resolve the value of ``inputs.ROLE=ref`` to a path or hub id.

    ``ref`` is a run directory (or the beginning of its path), the first letters of a fingerprint, a model directory, a
    file, a hub id, or, for model roles, an option of ``conf/model`` that has weights. Model roles resolve to
    ``<run>/model``, all others to ``<run>``.

    Args:
        ref: The value as typed.
        role: The role in which the stage reads it, such as ``policy``.
        outputs: Directory that holds the runs.
        option: Config key or command-line argument named in errors; by default ``inputs.ROLE``.

    Raises:
        UserError: ``ref`` matches nothing, more than one run, or an unfinished run.
    """
    option = option or f"inputs.{role}"
    ref = str(ref).rstrip("/") or "/"
    path = Path(ref).expanduser()
    if role in MODEL_ROLES and not path.exists():
        weights = model_options.weights(ref)
        if weights is not None and role in SCORE_ROLES:
            problem = "is a language model, which has no score head"
            raise UserError(problem, fix="type a run of stage=reward_model", option=option, value=ref)
        ref = weights or ref
        path = Path(ref).expanduser()
    if path.exists():
        return _existing(path, role, option)
    runs = find_runs_by_prefix(path, outputs)
    if len(runs) > 1:
        names = ", ".join(str(run.folder) for run in runs[:5])
        raise UserError(f"matches more than one run: {names}", fix="type more letters", option=option, value=ref)
    if runs:
        return _of_run(runs[0], role, option)
    if role != "selected_responses" and _looks_like_hub_id(ref):
        return Reference(ref, f"hub:{ref}")
    known = [str(run.folder) for run in find(outputs) if run.finished]
    models = model_options.with_weights() if role in MODEL_ROLES and role not in SCORE_ROLES else []
    examples = " or ".join([*models[:3], "ORG/NAME"])
    raise UserError(
        f"no such run, model directory or hub id{suggest(ref, [*known, *models])}",
        fix=f"type `rlhf runs list` to see the runs, or {examples} for a model of the hub",
        option=option,
        value=ref,
    )


def find_runs_by_prefix(path: Path, outputs: Path) -> list[Run]:
    """Return the runs whose path starts with ``path``, or whose fingerprint does (at least three hex letters)."""
    if len(path.parts) > 1:
        return [Run(folder) for folder in find_by_prefix(path) if (folder / "status.json").exists()]
    if not re.fullmatch(r"[0-9a-f]{3,}", path.name):
        return []
    return [run for run in find(outputs) if run.fingerprint.startswith(path.name)]


def find_by_prefix(path: Path) -> list[Path]:
    """Return the sorted, visible siblings whose name starts with that of ``path``.

    A ``*`` is matched literally: a shell passes it on unchanged when its own expansion found nothing.
    """
    if not path.parent.is_dir():
        return []
    found = (one for one in path.parent.iterdir() if one.name.startswith(path.name))
    return sorted(one for one in found if not one.name.startswith("."))


def _looks_like_hub_id(ref: str) -> bool:
    organisation, slash, name = ref.partition("/")
    return (
        bool(slash and re.fullmatch(r"[\w][\w.-]*", organisation) and re.fullmatch(r"[\w][\w.-]*", name))
        and not Path(organisation).exists()
    )


def _existing(path: Path, role: str, option: str) -> Reference:
    if (path / "status.json").exists():
        return _of_run(Run(path), role, option)
    owner = run_of(path)
    if owner is not None and not owner.finished:
        raise _unfinished(owner, option)
    if owner is not None and role in MODEL_ROLES and path.absolute() == (owner.folder / "model").absolute():
        return _of_run(owner, role, option)
    if (
        role in MODEL_ROLES
        and path.is_dir()
        and not any((path / name).exists() for name in ("config.json", "adapter_config.json"))
    ):
        problem = "is neither a run (status.json) nor a model directory (config.json)"
        raise UserError(problem, fix="type the directory of a run or a model", option=option, value=path)
    return Reference(str(path), identity(path), owner.folder if owner else None)


def _of_run(run: Run, role: str, option: str) -> Reference:
    if not run.finished:
        raise _unfinished(run, option)
    needed = dict.fromkeys(MODEL_ROLES, "model") | {
        "comparisons": "comparisons.jsonl",
        "more_comparisons": "comparisons.jsonl",
        "selected_responses": "selected_responses.jsonl",
    }
    if role in needed and not (run.folder / needed[role]).exists():
        problem = f"is a run of stage {run.stage}, which has no {needed[role]}"
        raise UserError(problem, fix="type another run", option=option, value=run.folder)
    return Reference(input_path(run.folder, role), run.fingerprint, run.folder)


def _unfinished(run: Run, option: str) -> UserError:
    command = run.status_file.get("command")
    fix = f"finish it with: {command}" if command else "type the command that made it again"
    damage = next((f": {name} {wrong}" for name, wrong in run.damage().items()), "") if run.status == "damaged" else ""
    return UserError(f"this run is not finished ({run.status}{damage})", fix=fix, option=option, value=run.folder)


def input_path(folder: Path, role: str) -> str:
    """Return the path that a stage reads of a run in a role: the model directory, or the run directory for data."""
    return str(folder / "model") if role in MODEL_ROLES else str(folder)
