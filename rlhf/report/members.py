"""The runs of a report: where they lie, what they were told and what came out, and what they descend from. No torch."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import Any

from rlhf import run_files
from rlhf.errors import UserError
from rlhf.links import first_out, leads_out
from rlhf.metrics_file import read_series
from rlhf.runs import Run, find, named_like, run_of

Value = str | int | float | bool | None
Series = dict[str, tuple[list[float], list[float]]]

# Config keys that say where things lie or how they are shown, not what is computed.
_IGNORED = re.compile(
    r"^(outputs|until|logger|callbacks|hydra|experiment|debug|pipeline|steps|compare|round|sweep_name|stage\.name)(\.|$)"
)
COSTS = {"minutes": "minutes", "tokens_per_s": "tokens/s", "peak_memory_gb": "peak GB"}


class MappingText(str):
    """A knob that is a mapping, such as `margin: {significantly: 2.0}`, as text; equal for mappings of equal content.

    Attributes:
        names: its keys, those of mappings within it dotted after them.
        plain: whether it holds values alone; otherwise there are nodes in it, which the text names by their class.
    """

    names: frozenset[str]
    plain: bool

    def __new__(cls, mapping: dict[Any, Any]) -> "MappingText":
        text = super().__new__(cls, _text(mapping))
        text.names = frozenset(_names(mapping))
        text.plain = not any("_target_" in node for node in _mappings(mapping))
        return text


@dataclass(frozen=True)
class Member:
    """A run in a report, with the knobs and ancestors by which it is compared."""

    run: Run

    @property
    def name(self) -> str:
        """Stage and first letters of the fingerprint."""
        return f"{self.run.stage}/{self.run.folder.name[:6]}"

    @cached_property
    def status(self) -> str:
        """State of the run, as it was when the report began."""
        return self.run.status

    @property
    def finished(self) -> bool:
        """Whether the run has results."""
        return self.status == "finished"

    @cached_property
    def ancestors(self) -> dict[str, Run]:
        """The runs this one descends from, nearest first, by a name that is unique in this family."""
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
    def knobs(self) -> dict[str, Value]:
        """Its config and those of its ancestors, flat: `objective.beta`, `reward_model: objective.margin`.

        A path into a run says only of which stage that is: what the runs differ in is there under their own names.
        """
        knobs = {"stage": self.run.stage} | _knobs(self.run)
        for name, run in self.ancestors.items():
            knobs.update({f"{name}: {key}": value for key, value in _knobs(run).items()})
        return knobs | {"stage": self.run.stage}

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Final metrics and costs. Of a run that is not finished, the newest row of its metrics.csv."""
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
        """What `rlhf.evaluation.compare` left in the run folder, oldest first."""
        return self.run.evaluations

    @property
    def headline(self) -> str | None:
        """The metric that a sweep of its stage optimises."""
        name = self.run.summary.get("headline")
        return name if isinstance(name, str) and name in self.metrics else None

    @cached_property
    def series(self) -> Series:
        """Everything logged: metric -> (steps, values)."""
        return read_series(self.run.folder / "metrics.csv")


def find_runs(reference: str | Path, outputs: Path) -> list[Run]:
    """The runs that a reference means: one run, all runs in a folder, or those whose fingerprint begins so.

    A run in which a file is a link out of it is none, nor is one that a link reaches outside of the outputs folder.
    """
    path = Path(reference)
    if is_run(path):
        return [Run(path)]
    if (link := first_out(path, path)) is not None and (path / "status.json").is_file():
        raise UserError(
            f"{reference}: {link.name} is a link to {link.resolve()}, outside of the run; put the file in its place"
        )
    if path.is_dir():
        # A sweep links to the runs of its jobs, which lie in the outputs folder that it lies in.
        roots = [outputs, path, *([path.resolve().parents[1]] if path.resolve().parent.name == "sweeps" else [])]
        found = [Run(folder) for folder in sorted(_run_folders(path, 3, roots))]
        if not found:
            raise UserError(f"{reference}: no runs in this folder; type a run folder, a sweep folder or {outputs}")
        if (path / "multirun.yaml").is_file():  # a sweep: a job's result stays one where another job goes on from it
            return found
        # A job of a pipeline is its last run: the steps before are its ancestors.
        above = {str(fingerprint) for run in found for fingerprint in run.lineage.get("ancestors") or {}}
        last = [run for run in found if run.fingerprint not in above]
        return last or found
    if begun := [Run(found) for found in named_like(path) if is_run(found)]:
        return begun
    by_name = [run for run in find(outputs) if run.fingerprint.startswith(str(reference))]
    if not by_name:
        raise UserError(f"{reference}: no such run or folder; `rlhf runs list` shows the runs")
    return by_name


def newest_sweep(outputs: Path) -> Path | None:
    """The sweep folder that was made last."""
    folders = [folder for folder in (outputs / "sweeps").glob("*") if folder.is_dir()]
    return max(folders, key=lambda folder: folder.stat().st_mtime, default=None)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run folder, all of whose files are its own."""
    own = all((folder / name).is_file() for name in ("status.json", "config.yaml"))
    return own and first_out(folder, folder) is None


def _run_folders(folder: Path, depth: int, roots: Sequence[Path]) -> Iterator[Path]:
    """Run folders below a folder by their real place, links followed that stay below one of ``roots``."""
    for child in sorted(folder.iterdir()):
        if not child.is_dir() or child.name.startswith("."):  # such as what is left of a run that was removed
            continue
        if child.is_symlink() and all(leads_out(child, root) for root in roots):
            continue
        if is_run(child):
            yield _display(child)
        elif depth > 1:
            yield from _run_folders(child, depth - 1, roots)


def _display(folder: Path) -> Path:
    real = folder.resolve()
    return real.relative_to(Path.cwd()) if real.is_relative_to(Path.cwd()) else real


def parents(run: Run) -> list[tuple[str, Run]]:
    """The runs a run read from, with the role each had, from lineage.json; those that are gone are left out."""
    lineage = run.lineage
    ancestors = lineage.get("ancestors") or {}
    found: list[tuple[str, Run]] = []
    for role, identities in (lineage.get("inputs") or {}).items():
        for identity in identities:
            # A run's fingerprint, a path inside it after a slash, a hash of files, or a hub id.
            place = (ancestors.get(str(identity).partition("/")[0]) or {}).get("folder")
            if place is None:
                continue
            # Typed from another folder, or moved: runs of one outputs folder lie beside each other.
            for folder in (Path(place), run.folder.resolve().parents[1].joinpath(*Path(place).parts[-2:])):
                if is_run(folder):
                    found.append((str(role), Run(folder)))
                    break
    return found


def _knobs(run: Run) -> dict[str, Value]:
    """Return the config of one run, flat; runs of a sweep share their ancestors."""
    make = lambda: {key: _stage_of(value) for key, value in flatten(run.plain_config)}  # noqa: E731
    return run_files.once.get(("knobs", str(run.folder)), make)


def _stage_of(value: Value) -> Value:
    """The stage of the run that a path leads into, or of the runs in a list; anything else as it is."""
    if not isinstance(value, str) or isinstance(value, MappingText) or "/" not in value:
        return value
    try:
        paths = json.loads(value) if value.startswith("[") else [value]
    except ValueError:  # text that begins with a bracket, such as a template
        return value
    stages = [run.stage for path in paths if isinstance(path, str) and (run := run_of(Path(path))) is not None]
    if len(stages) < len(paths) or len(set(stages)) != 1:
        return value
    return f"{len(stages)} {'run' if len(stages) == 1 else 'runs'} of {stages[0]}"


def flatten(node: Any, prefix: str = "", inside: bool = False) -> Iterator[tuple[str, Value]]:
    """Dotted keys of a config. A group's `_target_` stands under the group's own name, as the class's name.

    A mapping that is a knob of a group (`inside` one) comes twice: as a whole, a `MappingText`, and then by its keys.
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
    """A value inside a mapping as one would type it: of a node the class, of a path into a run the run's stage."""
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
    """1.0 as 1, in lists too: it is the same setting, and one text."""
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
