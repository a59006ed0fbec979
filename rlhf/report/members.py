"""Runs of a report: their places, hyperparameters, results and ancestors. This module imports no torch."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.planning.references import find_by_prefix
from rlhf.runs import run_files
from rlhf.runs.run_directory import Run, find, run_of
from rlhf.storage.links import first_outside, leads_out
from rlhf.storage.metrics_file import Series, read_series

Value = str | int | float | bool | None

# Config keys that set places or output and do not change results.
_IGNORED = re.compile(
    r"^(outputs|until|logger|callbacks|hydra|experiment|debug|pipeline|steps|compare|round|sweep_name|stage\.name)(\.|$)"
)
COSTS = {"minutes": "minutes", "tokens_per_s": "tokens/s", "peak_memory_gb": "peak GB"}


class MappingText(str):
    """Text of a hyperparameter that is a mapping, such as `margin: {significantly: 2.0}`.

    Mappings of equal content give equal texts.

    Attributes:
        names: its keys; keys of nested mappings are dotted.
        plain: whether it holds only values; otherwise it contains nodes, which the text represents by their class.
    """

    names: frozenset[str]
    plain: bool

    def __new__(cls, mapping: dict[Any, Any]) -> "MappingText":
        """Build the text of a mapping."""
        text = super().__new__(cls, _text(mapping))
        text.names = frozenset(_names(mapping))
        text.plain = not any("_target_" in node for node in _mappings(mapping))
        return text


@dataclass(frozen=True)
class Member:
    """Run of a report, with the hyperparameters and ancestors by which it is compared."""

    run: Run

    @property
    def name(self) -> str:
        """Return the stage and the first six letters of the fingerprint."""
        return f"{self.run.stage}/{self.run.folder.name[:6]}"

    @cached_property
    def status(self) -> str:
        """Return the status of the run, as it was at first access."""
        return self.run.status

    @property
    def finished(self) -> bool:
        """Return whether the run has results."""
        return self.status == "finished"

    @cached_property
    def ancestors(self) -> dict[str, Run]:
        """Return the run's ancestors, nearest first, under names that are unique among them."""
        named: dict[str, Run] = {}
        queue = list(parents(self.run))
        seen: set[str] = set()
        while queue:
            role, run = queue.pop(0)
            if run.fingerprint in seen:
                continue
            seen.add(run.fingerprint)
            stage = run.stage
            names = chain((stage, f"{stage}({role})"), (f"{stage}({role} {n})" for n in count(2)))
            named[next(name for name in names if name not in named)] = run
            queue.extend(parents(run))
        return named

    @cached_property
    def hyperparameters(self) -> dict[str, Value]:
        """Return the config of the run and of its ancestors, flat: `objective.beta`, `reward_model: objective.margin`.

        A path into a run is replaced by the run's stage, because the ancestor's own hyperparameters are listed under
        its name.
        """
        hyperparameters = {"stage": self.run.stage} | _hyperparameters(self.run)
        for name, run in self.ancestors.items():
            hyperparameters.update({f"{name}: {key}": value for key, value in _hyperparameters(run).items()})
        return hyperparameters | {"stage": self.run.stage}

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Return the final metrics and costs; for an unfinished run, the newest values of its metrics.csv."""
        summary = self.run.summary
        metrics = {name: number for name, value in self.run.metrics.items() if (number := _number(value)) is not None}
        if not metrics:
            metrics = {name: values[-1] for name, (_, values) in self.series.items()}
        for evaluation in self.evaluations:
            for when in ("before", "after"):
                metrics |= {f"{when}_{name}": value["mean"] for name, value in evaluation.get(when, {}).items()}
            metrics |= {
                f"{name}_difference": value["mean"] for name, value in evaluation.get("differences", {}).items()
            }
            if (kl := evaluation.get("kl")) is not None:
                metrics["after_kl"] = kl["mean"]
        costs = {name: _number(summary.get(name)) for name in COSTS}
        costs["minutes"] = None if (seconds := _number(summary.get("wall_s"))) is None else seconds / 60
        peaks = summary.get("peak_memory_bytes") or {}
        peak = _number(peaks.get("gpu", peaks.get("cpu")))
        costs["peak_memory_gb"] = None if peak is None else peak / 1e9
        metrics |= {name: value for name, value in costs.items() if value is not None}
        return metrics

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """Return the results that `rlhf.evaluation.compare.compare` wrote to the run directory, oldest first."""
        return self.run.evaluations

    @property
    def headline(self) -> str | None:
        """Return the name of the metric that a sweep of its stage optimises; None if the run has no such metric."""
        name = self.run.summary.get("headline")
        return name if isinstance(name, str) and name in self.metrics else None

    @cached_property
    def series(self) -> Series:
        """Return everything logged: metric -> (steps, values)."""
        return read_series(self.run.folder / "metrics.csv")


def find_runs(reference: str | Path, outputs: Path) -> list[Run]:
    """Return the runs that a reference selects.

    A reference is a run directory, a directory of runs, or the beginning of a path or of a fingerprint. A run that
    contains a link to a file outside of it is not a run, nor is one that only a link out of the outputs directory
    reaches.

    Args:
        reference: The reference, as typed.
        outputs: Directory in which fingerprints are looked up.

    Raises:
        UserError: No run is selected.
    """
    path = Path(reference)
    if is_run(path):
        return [Run(path)]
    if (link := first_outside(path, path)) is not None and (path / "status.json").is_file():
        problem = f"{reference}: {link.name} is a link to {link.resolve()}, outside of the run"
        raise UserError(problem, fix="replace the link by the file")
    if path.is_dir():
        # A sweep links to the runs of its jobs, which are in the same outputs directory as the sweep.
        roots = [outputs, path, *([path.resolve().parents[1]] if path.resolve().parent.name == "sweeps" else [])]
        found = [Run(folder) for folder in sorted(_run_directories(path, 3, roots))]
        if not found:
            fix = f"type a run directory, a sweep directory or {outputs}"
            raise UserError(f"{reference}: no runs in this directory", fix=fix)
        if (path / "multirun.yaml").is_file():  # a sweep: every job is a result, even if another job reads it
            return found
        # A pipeline is represented by its last run: the earlier steps are its ancestors.
        above = {str(fingerprint) for run in found for fingerprint in run.lineage.get("ancestors") or {}}
        last = [run for run in found if run.fingerprint not in above]
        return last or found
    if begun := [Run(found) for found in find_by_prefix(path) if is_run(found)]:
        return begun
    by_name = [run for run in find(outputs) if run.fingerprint.startswith(str(reference))]
    if not by_name:
        raise UserError(f"{reference}: no such run or directory", fix="type `rlhf runs list` to see the runs")
    return by_name


def newest_sweep(outputs: Path) -> Path | None:
    """Return the newest sweep directory; None without any."""
    folders = [folder for folder in (outputs / "sweeps").glob("*") if folder.is_dir()]
    return max(folders, key=lambda folder: folder.stat().st_mtime, default=None)


def is_run(folder: Path) -> bool:
    """Return whether a directory is a run directory without links to files outside of it."""
    own = all((folder / name).is_file() for name in ("status.json", "config.yaml"))
    return own and first_outside(folder, folder) is None


def _run_directories(folder: Path, depth: int, roots: Sequence[Path]) -> Iterator[Path]:
    """Yield run directories below a directory by their real path; follow only links that stay below a root."""
    for child in sorted(folder.iterdir()):
        if not child.is_dir() or child.name.startswith("."):  # such as the remains of a removed run
            continue
        if child.is_symlink() and all(leads_out(child, root) for root in roots):
            continue
        if is_run(child):
            yield _display(child)
        elif depth > 1:
            yield from _run_directories(child, depth - 1, roots)


def _display(folder: Path) -> Path:
    real = folder.resolve()
    return real.relative_to(Path.cwd()) if real.is_relative_to(Path.cwd()) else real


def parents(run: Run) -> list[tuple[str, Run]]:
    """Return (role, run) of the runs that a run read, from lineage.json; missing runs are left out."""
    lineage = run.lineage
    ancestors = lineage.get("ancestors") or {}
    found: list[tuple[str, Run]] = []
    for role, identities in (lineage.get("inputs") or {}).items():
        for identity in identities:
            # An identity is a fingerprint (and a path inside the run after a slash), a hash of files, or a hub id.
            place = (ancestors.get(str(identity).partition("/")[0]) or {}).get("folder")
            if place is None:
                continue
            # A relative path from another working directory, or a moved outputs directory: look beside the run too.
            for folder in (Path(place), run.folder.resolve().parents[1].joinpath(*Path(place).parts[-2:])):
                if is_run(folder):
                    found.append((str(role), Run(folder)))
                    break
    return found


def _hyperparameters(run: Run) -> dict[str, Value]:
    """Return the config of one run, flat; cached, since runs of a sweep share their ancestors."""
    make = lambda: {key: _stage_of(value) for key, value in flatten(run.plain_config)}  # noqa: E731
    return run_files.once.get(("hyperparameters", str(run.folder)), make)


def _stage_of(value: Value) -> Value:
    """Return the stage of the run that a path leads into, or of the runs in a list; any other value unchanged."""
    if not isinstance(value, str) or isinstance(value, MappingText) or "/" not in value:
        return value
    try:
        paths = json.loads(value) if value.startswith("[") else [value]
    except ValueError:  # text that starts with a bracket, such as a template
        return value
    stages = [run.stage for path in paths if isinstance(path, str) and (run := run_of(Path(path))) is not None]
    if len(stages) < len(paths) or len(set(stages)) != 1:
        return value
    return f"{len(stages)} {'run' if len(stages) == 1 else 'runs'} of {stages[0]}"


def flatten(node: Any, prefix: str = "", inside: bool = False) -> Iterator[tuple[str, Value]]:
    """Yield the dotted keys of a config with their values; a group's `_target_` is the group's own key -> class name.

    A mapping that is a hyperparameter of a group (``inside`` one) appears twice: as a whole, a `MappingText`, and by
    its keys.
    """
    inside = inside or "_target_" in node
    for key, value in node.items():
        name = prefix.rstrip(".") if key == "_target_" and prefix else f"{prefix}{key}"
        if key == "_partial_" or _IGNORED.match(name):
            continue
        if key == "_target_":
            yield name, str(value).rpartition(".")[2]
        elif isinstance(value, dict):
            if inside and "_target_" not in value:
                yield name, MappingText(value)
            yield from flatten(value, f"{name}.", inside)
        elif isinstance(value, list):
            yield name, json.dumps(_whole(value))
        else:
            yield name, value


def _text(value: Any) -> str:
    """Return a value inside a mapping as one would type it: a node as its class, a path into a run as its stage."""
    if isinstance(value, dict):
        if "_target_" in value:
            return str(value["_target_"]).rpartition(".")[2]
        entries = sorted((_text(key), _text(inner)) for key, inner in value.items())
        return "{" + ", ".join(f"{key}: {inner}" for key, inner in entries) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    value = _whole(_stage_of(value))
    plain = (
        isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w.-]*", value) and value not in ("null", "true", "false")
    )
    return value if plain else json.dumps(value)


def _whole(value: Any) -> Any:
    """Return 1.0 as 1, in lists too: both are the same setting and need the same text."""
    if isinstance(value, list):
        return [_whole(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _names(mapping: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in mapping.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict) and "_target_" not in value:
            yield from _names(value, f"{prefix}{key}.")


def _mappings(value: Any) -> Iterator[dict[Any, Any]]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _mappings(inner)
    if isinstance(value, dict):
        yield value


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
