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


def resolve(ref: str, role: str, outputs: Path, key: str | None = None) -> Reference:
    """Resolve the value of ``inputs.ROLE=ref`` to a path or hub id.

    ``ref`` is a run directory (or the beginning of its path), the first letters of a fingerprint, a model directory, a
    file, a hub id, or, for model roles, an option of ``conf/model`` that has weights. Model roles resolve to
    ``<run>/model``, all others to ``<run>``.

    Args:
        ref: The value as typed.
        role: The role in which the stage reads it, such as ``policy``.
        outputs: Directory that holds the runs.
        key: Config key named in error messages; by default ``inputs.ROLE``.

    Raises:
        UserError: ``ref`` matches nothing, more than one run, or an unfinished run.
    """
    key = key or f"inputs.{role}"
    ref = str(ref).rstrip("/") or "/"
    path = Path(ref).expanduser()
    if role in MODEL_ROLES and not path.exists():
        weights = model_options.weights(ref)
        if weights is not None and role in SCORE_ROLES:
            raise UserError(f"{key}={ref}: is a language model, which scores nothing; name a run of stage=reward_model")
        ref = weights or ref
        path = Path(ref).expanduser()
    if path.exists():
        return _existing(path, role, key)
    runs = find_runs_by_prefix(path, outputs)
    if len(runs) > 1:
        names = ", ".join(str(run.folder) for run in runs[:5])
        raise UserError(f"{key}={ref} means more than one run: {names}; type more letters")
    if runs:
        return _of_run(runs[0], role, key)
    if role != "picks" and _looks_like_hub_id(ref):
        return Reference(ref, f"hub:{ref}")
    known = [str(run.folder) for run in find(outputs) if run.finished]
    options = model_options.with_weights() if role in MODEL_ROLES and role not in SCORE_ROLES else []
    raise UserError(
        f"{key}={ref}: no such run, model folder or hub id{suggest(ref, [*known, *options])}; "
        f"type `rlhf runs list` to see the runs, or {' or '.join([*options[:3], 'ORG/NAME'])} for a model of the hub"
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


def _existing(path: Path, role: str, key: str) -> Reference:
    if (path / "status.json").exists():
        return _of_run(Run(path), role, key)
    owner = run_of(path)
    if owner is not None and not owner.finished:
        raise _unfinished(owner, key)
    if owner is not None and role in MODEL_ROLES and path.absolute() == (owner.folder / "model").absolute():
        return _of_run(owner, role, key)
    if (
        role in MODEL_ROLES
        and path.is_dir()
        and not any((path / name).exists() for name in ("config.json", "adapter_config.json"))
    ):
        raise UserError(f"{key}={path}: neither a run (status.json) nor a model folder (config.json)")
    return Reference(str(path), identity(path), owner.folder if owner else None)


def _of_run(run: Run, role: str, key: str) -> Reference:
    if not run.finished:
        raise _unfinished(run, key)
    needed = dict.fromkeys(("comparisons", "more_comparisons"), "comparisons.jsonl") | {"picks": "picks.jsonl"}
    needed |= dict.fromkeys(MODEL_ROLES, "model")
    if role in needed and not (run.folder / needed[role]).exists():
        what = "model" if role in MODEL_ROLES else role
        raise UserError(f"{key}={run.folder}: a run of stage {run.stage} that made no {what}; name another run")
    return Reference(input_path(run.folder, role), run.fingerprint, run.folder)


def _unfinished(run: Run, key: str) -> UserError:
    command = run.status_file.get("command")
    again = f"; finish it with: {command}" if command else ""
    damage = next((f": {name} {wrong}" for name, wrong in run.damage().items()), "") if run.status == "damaged" else ""
    return UserError(f"{key}={run.folder}: this run is not finished ({run.status}{damage}){again}")


def input_path(folder: Path, role: str) -> str:
    """Return the path that a stage reads of a run in a role: the model directory, or the run directory for data."""
    return str(folder / "model") if role in MODEL_ROLES else str(folder)
