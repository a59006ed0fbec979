"""Runs: named by what they compute, kept as plain files.

A run folder is ``outputs/<stage>/<fingerprint>/`` with config.yaml, lineage.json, status.json, metrics.csv,
summary.json, manifest.json, checkpoints/ and model/ (`rlhf.run_directory`). No torch here.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import hydra.utils
from omegaconf import OmegaConf

from rlhf import user_code
from rlhf.cache import Once, recall, remember
from rlhf.config import Plain, leaves, targets
from rlhf.errors import UserError, data_keys, suggest
from rlhf.files import write_json as write_json
from rlhf.run_directory import Run
from rlhf.run_directory import now as now
from rlhf.run_directory import remove as remove

MODEL_ROLES = ("policy", "base", "reference", "reward_model", "safety_model", "value", "judge")
SCORE_ROLES = ("reward_model", "safety_model")
LETTERS = 10  # of the fingerprint, in a folder's name

# Keys of a step's config that cannot change what it computes.
_IRRELEVANT = ("logger", "callbacks", "outputs", "until", "progress", "inputs", "experiment", "debug")
# Parts of rlhf that cannot change what a stage computes.
_IRRELEVANT_SOURCE = frozenset(
    # fmt: off
    [
        "__init__",
        "checkpoint_files",
        "checked",
        "checkpoints",
        "cli",
        "comparison",
        "conf",
        "config",
        "discovery",
        "errors",
        "evaluation",
        "files",
        "importing",
        "launcher",
        "likelihood",
        "locks",
        "manifest",
        "metrics",
        "metrics_file",
        "model_options",
        "pipeline",
        "plan",
        "processes",
        "progress",
        "report",
        "rounds",
        "run_directory",
        "run_files",
        "runs",
        "signals",
        "summary",
        "testing",
        "user_code",
        "using",
        "validation",
        "worker",
    ]
    # fmt: on
)
# Files that count by their content even where the name alone is typed.
_NAMED_BY_CONTENT = (".jinja", ".gguf")
_HASHED_WHOLE = 256 * 2**20  # bytes; a larger file is known by its size, time of change and first MiB


def find(outputs: Path) -> list[Run]:
    """All runs below an outputs folder, by stage and then by time."""
    folders = [path.parent for path in outputs.glob("*/*/status.json")]
    found = [Run(folder) for folder in folders if folder.parent.name != "sweeps" and not _hidden(folder)]
    return sorted(found, key=lambda run: (run.stage, str(run.status_file.get("started")), run.folder.name))


def is_run_folder(folder: Path, outputs: Path) -> bool:
    """Whether a folder is a run's by its place and name, ``<outputs>/<stage>/<fingerprint>``, and no link to one."""
    named = re.fullmatch(rf"[0-9a-f]{{{LETTERS}}}", folder.name) is not None
    inside = folder.resolve().parent.parent == outputs.resolve() and not folder.parent.name.startswith(".")
    linked = folder.is_symlink() or folder.parent.is_symlink()
    described = any((folder / name).is_file() for name in ("status.json", "config.yaml", "lineage.json"))
    return named and inside and not linked and described


def _hidden(folder: Path) -> bool:
    """Whether a folder is no run but what is left of one that was removed."""
    return folder.name.startswith(".") or folder.parent.name.startswith(".")


# References: what a user types for a run or a model


@dataclass(frozen=True)
class Reference:
    """What an input means: the path or hub id that a stage reads, and what names it in a fingerprint."""

    path: str
    identity: str
    run: Path | None = None  # the run folder it comes from


def resolve(ref: str, role: str, outputs: Path, key: str | None = None) -> Reference:
    """What the user means by ``inputs.ROLE=ref``.

    ``ref`` is a run folder (or the beginning of one's path), the first letters of a fingerprint, a model folder, a
    file, a hub id, or for model roles an option of ``conf/model`` that has weights. Model roles give ``<run>/model``,
    the others ``<run>``.

    Raises:
        UserError: nothing, more than one thing, or something unfinished is meant.
    """
    from rlhf import model_options  # not at the top: it reads plugins' folders

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
    runs = beginning_with(path, outputs)
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


def beginning_with(path: Path, outputs: Path) -> list[Run]:
    """Return the runs whose path begins so, or whose fingerprint does, in three letters or more."""
    if len(path.parts) > 1:
        return [Run(folder) for folder in named_like(path) if (folder / "status.json").exists()]
    if not re.fullmatch(r"[0-9a-f]{3,}", path.name):
        return []
    return [run for run in find(outputs) if run.fingerprint.startswith(path.name)]


def named_like(path: Path) -> list[Path]:
    """What begins as `path` does; a `*` in it, left by a shell that found nothing, is a letter like any other."""
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
    """What a stage reads of a run in a role: the model folder, or the run folder itself for data."""
    return str(folder / "model") if role in MODEL_ROLES else str(folder)


def run_of(path: Path) -> Run | None:
    """The run that a path lies in, if any."""
    for folder in (path, *list(path.parents)[:3]):
        if (folder / "status.json").exists() and (folder / "config.yaml").exists():
            return Run(folder)
    return None


# Fingerprints


def fingerprint(
    config: Plain,
    inputs: Mapping[str, list[str]],
    planned: Mapping[str, str],
    digests: Iterable[str] | None = None,
) -> str:
    """The name of what a resolved step config computes: 64 hex letters, the first of them a to f.

    Args:
        config: the resolved config; logger, callbacks, folders and the like do not count.
        inputs: role -> identities (a run's fingerprint, a hash of files, a hub id) of the inputs that are read.
        planned: run folder -> fingerprint of the runs that the config may name by path, which need not exist yet.
        digests: `keys_with_digest(config)` where it is known already, so that no other class is imported.
    """
    relevant = {key: value for key, value in config.items() if key not in _IRRELEVANT}
    callbacks = {key: node for key, node in (config.get("callbacks") or {}).items() if user_sources(node)}
    if callbacks:  # those of the user may change what is computed; the built-in ones only watch
        relevant["callbacks"] = callbacks
    model = relevant.get("model")
    if isinstance(model, dict) and model.get("path"):
        # The folder says its own architecture.
        relevant["model"] = {key: value for key, value in model.items() if key != "architecture"}
    payload = {
        "config": _canonical(relevant, planned),
        "inputs": {role: list(names) for role, names in sorted(inputs.items())},
        "data": data_digests(relevant, planned, keys_with_digest(config) if digests is None else digests),
        "source": _sources(relevant),
    }
    text = json.dumps(payload, sort_keys=True)
    # Begins with a letter: 625e06 would be typed as a run's first letters and read as a number.
    names = (hashlib.sha256(f"{attempt}{text}".encode()).hexdigest() for attempt in count())
    return next(name for name in names if name[0].isalpha())


def _canonical(node: Any, planned: Mapping[str, str]) -> Any:
    """Equal for configs that mean the same: 1 and 1.0, a run by whatever path, a file by its content."""
    if isinstance(node, dict):
        return {str(key): _canonical(value, planned) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_canonical(value, planned) for value in node]
    if isinstance(node, float) and node.is_integer():
        return int(node)
    if isinstance(node, str) and ("/" in node or node.endswith(_NAMED_BY_CONTENT)):
        for folder, name in planned.items():
            if node == folder or node.startswith(folder + "/"):
                return name + node[len(folder) :]
        with suppress(OSError):
            if Path(node).expanduser().exists():
                return identity(Path(node).expanduser())
    return node


def identity(path: Path) -> str:
    """What names a path in a fingerprint: the run it lies in, else a hash of its content."""
    run = run_of(path)
    if run is not None:
        return f"{run.fingerprint}/{path.relative_to(run.folder)}"
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        # A file by itself is its content, wherever it lies and whatever it is called.
        total.update(f"{file.relative_to(path) if path.is_dir() else ''}\0{_file_digest(file)}\0".encode())
    return f"sha256:{total.hexdigest()}"


def _file_digest(path: Path) -> str:
    stat = path.stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns)


@cache
def _digest(path: Path, size: int, changed_ns: int) -> str:
    with path.open("rb") as file:
        if size <= _HASHED_WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        return f"{size}-{changed_ns}-{hashlib.sha256(file.read(2**20)).hexdigest()}"


def keys_with_digest(config: Plain) -> tuple[str, ...]:
    """Keys of the nodes whose class has a ``digest`` of the data it reads; imports the classes."""
    return tuple(
        key
        for key, node in targets(config)
        if callable(getattr(hydra.utils.get_object(node["_target_"]), "digest", None))
    )


def data_digests(config: Plain, planned: Mapping[str, str], keys: Iterable[str]) -> dict[str, str]:
    """Digests of the data that nodes read, from their own ``digest()``; data made by a run is named by that run."""
    found: dict[str, str] = {}
    for key, node in targets(config):
        if key not in keys:
            continue
        strings = [value for _, value in leaves(node, key) if isinstance(value, str)]
        if any(value == folder or value.startswith(folder + "/") for value in strings for folder in planned):
            continue
        try:
            found[key] = str(hydra.utils.instantiate(OmegaConf.create(node)).digest())
        except UserError as error:
            raise UserError(data_keys(str(error), key)) from None
    return found


def _sources(config: Plain) -> dict[str, str]:
    """Digest of the code of rlhf, of every plugin that the config names, and of the user's own modules it leads to."""
    packages = {"rlhf"} | {str(node["_target_"]).partition(".")[0] for _, node in targets(config)}
    found: dict[str, str] = {}
    for package in sorted(packages):
        folder = _source_folder(package)
        if folder is not None:
            found[package] = source_digest(folder, _IRRELEVANT_SOURCE if package == "rlhf" else frozenset({"conf"}))
    return found | user_sources(config)


def user_sources(config: Plain) -> dict[str, str]:
    """Return the digest of each module of the user that a config names, or that such a module or a plugin imports."""
    digests = {}
    for module, path in user_code.files(user_code.named(config)).items():
        if _source_folder(module.partition(".")[0]) is None:  # a plugin counts as a whole
            digests[f"module {module}"] = _code(path, path.stat().st_mtime_ns)
    return digests


def _source_folder(package: str) -> Path | None:
    """Folder of rlhf or of a plugin; None for a library, which has no conf/ and whose version is in summary.json."""
    folder = _package_folder(package)
    return folder if folder is not None and (package == "rlhf" or (folder / "conf").is_dir()) else None


def _package_folder(package: str) -> Path | None:
    spec = find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def package_digest(package: str) -> str | None:
    """Digest of all the code of rlhf or of a plugin; None for a library."""
    folder = _source_folder(package)
    return None if folder is None else source_digest(folder)


def source_digest(folder: Path, leave_out: Iterable[str] = ()) -> str:
    """Digest of a package's Python code and chat templates; comments, docstrings and layout of code do not count."""
    left_out = frozenset(leave_out)
    return _once.get((folder, left_out), lambda: _source_digest(folder, left_out))


_once = Once("sources")
sources_read_once = _once.open  # for all steps of a plan


def _source_digest(folder: Path, left_out: frozenset[str]) -> str:
    files = [
        (path.relative_to(folder).as_posix(), path, path.stat())
        for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.jinja")])
        if "tests" not in path.relative_to(folder).parts
    ]
    counted = [file for file in files if file[0].partition("/")[0].removesuffix(".py") not in left_out]
    # Parsing takes seconds; files of the same sizes and times were parsed before.
    state = json.dumps([str(folder), [(name, stat.st_size, stat.st_mtime_ns) for name, _, stat in counted]])
    key = hashlib.sha256(state.encode()).hexdigest()
    known = recall("sources", key)
    if known:
        return known
    total = hashlib.sha256()
    for name, path, stat in counted:
        total.update(f"{name}\0{_code(path, stat.st_mtime_ns)}\0".encode())
    remember("sources", key, total.hexdigest())
    return total.hexdigest()


@cache
def _code(path: Path, changed_ns: int) -> str:
    if path.suffix != ".py":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()
