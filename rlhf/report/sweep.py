"""Comparison of runs: the hyperparameters in which they differ, and their results. This module imports no torch."""

import csv
import math
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from rlhf.errors import UserError
from rlhf.functional.statistics import estimate, t_quantile
from rlhf.report.members import COSTS, MappingText, Member, Value, find_runs
from rlhf.runs.run_directory import Run
from rlhf.storage.metrics_file import distinct_names

# Patterns of the most informative metrics, in order; the names are those that stages log.
_INFORMATIVE = (
    r"gold$",
    r"(^|/|^after_)(score|reward|reward_selected)$",
    r"(^|/|_)kl$",
    r"gold_difference$",
    r"win",
    r"accuracy",
    r"val/|held_out",
    r"perplexity",
    r"loss$",
    r"margin",
    r"entropy",
    r"length|ended|eos",
)
_UNINFORMATIVE = re.compile(
    r"^(headline|epoch|learning_rate|gradient_norm|before_.*|.*_z|.*_se|.*_std|.*_(length|ended)_difference|.*seconds)$"
)
# Training losses are excluded: PPO's hardly changes while the reward grows.
_LOWER_IS_BETTER = re.compile(r"^val/.*loss$|perplexity")
_HIGHER_IS_BETTER = re.compile(r"gold|reward|score|accuracy|win")


@dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed: one point of a comparison, with an error bar if there are several."""

    label: str
    hyperparameters: dict[str, Value]
    members: list[Member]

    @cached_property
    def counted(self) -> list[Member]:
        """Return the runs that enter the means: the finished ones; if none is finished, all that have not failed.

        The last logged values of a failed run are not a result.
        """
        finished = [member for member in self.members if member.finished]
        return finished or [member for member in self.members if member.status != "failed"]

    def values(self, metric: str) -> list[float]:
        """Return the metric's final values, one per counted run that has a finite one."""
        return [m.metrics[metric] for m in self.counted if metric in m.metrics and math.isfinite(m.metrics[metric])]

    def broken(self, metric: str) -> int:
        """Return how many counted runs have a value of nan or infinity, which no mean includes."""
        return sum(metric in m.metrics and not math.isfinite(m.metrics[metric]) for m in self.counted)

    def mean(self, metric: str) -> float:
        """Return the mean over seeds; nan if no run has the metric."""
        values = self.values(metric)
        return math.fsum(values) / len(values) if values else math.nan

    def error(self, metric: str) -> float:
        """Return the standard error over seeds; nan for fewer than two runs."""
        values = self.values(metric)
        return estimate(values).se if values else math.nan


@dataclass
class Comparison:
    """Comparison of the runs of a report.

    `varying` are the hyperparameters in which they differ, without the seed and without those that only repeat another;
    `together` names for each of these the hyperparameters of the same group that change with it.
    """

    members: list[Member]
    metrics: list[str]
    varying: list[str] = field(init=False)
    together: dict[str, list[str]] = field(init=False)
    groups: list[Group] = field(init=False)

    def __post_init__(self) -> None:
        self.varying, self.together = varying(self.members)
        grouped: dict[tuple[Value, ...], list[Member]] = {}
        for member in self.members:
            grouped.setdefault(tuple(member.hyperparameters.get(key) for key in self.varying), []).append(member)
        ordered = sorted(grouped.items(), key=lambda item: [_order(value) for value in item[0]])
        self.groups = [
            Group(self._label(key, members), dict(zip(self.varying, key, strict=True)), members)
            for key, members in ordered
        ]

    def _label(self, key: tuple[Value, ...], members: list[Member]) -> str:
        short = short_names(self.varying)
        parts = [
            show(value) if name in ("stage", "objective") else f"{short[name]}={show(value) or 'null'}"
            for name, value in zip(self.varying, key, strict=True)
            if name in members[0].hyperparameters
        ]
        return ", ".join(parts) or members[0].name

    @property
    def seeds(self) -> int:
        """Return the largest number of runs in a group."""
        return max((len(group.members) for group in self.groups), default=0)

    @property
    def error_note(self) -> str:
        """Return the explanation of the error of a mean, with the factor that turns it into a 95% interval."""
        return (
            "mean ± standard error over seeds; a 95% interval is "
            f"± {t_quantile(self.seeds - 1):.1f} standard errors with {self.seeds} seeds"
        )

    def main_metrics(self, count: int) -> list[str]:
        """Return the metrics to show: those requested, else the sweeps' headlines, then the first by `_INFORMATIVE`."""
        if self.metrics:
            return self.metrics
        names = {name for member in self.members for name in member.metrics if not _UNINFORMATIVE.match(name)}
        first = [name for name in dict.fromkeys(member.headline for member in self.members) if name is not None]
        per_kind: dict[int, int] = {}
        for name in sorted(names - set(COSTS) - set(first), key=_rank):
            kind = _rank(name)[0]
            per_kind[kind] = per_kind.get(kind, 0) + 1
            # At most two of a kind: a third variant adds less information than another quantity.
            if per_kind[kind] <= 2:
                first.append(name)
        return first[:count]

    def distinct(self, count: int) -> list[str]:
        """Return the most informative metrics, one of each kind: gold reward and accuracy, not two gold rewards."""
        kinds: dict[int, str] = {}
        for name in self.main_metrics(20):
            kinds.setdefault(_rank(name)[0], name)
        return self.metrics or list(kinds.values())[:count]

    def costs(self) -> list[str]:
        """Return the costs that any run has recorded."""
        return [name for name in COSTS if any(name in member.metrics for member in self.members)]

    def best(self, metric: str) -> Group | None:
        """Return the group with the best mean; None if there is no clear best group.

        None if the better direction is unknown, if fewer than two groups have finished runs without nan, or if the lead
        over the second is within two standard errors of the difference.
        """
        lower = _LOWER_IS_BETTER.search(metric) is not None
        known = [g for g in self.groups if g.values(metric) and not g.broken(metric) and g.counted[0].finished]
        if len(known) < 2 or not (lower or _HIGHER_IS_BETTER.search(metric)):
            return None
        first, second = sorted(known, key=lambda group: group.mean(metric) * (1 if lower else -1))[:2]
        lead, noise = (
            abs(first.mean(metric) - second.mean(metric)),
            math.hypot(first.error(metric), second.error(metric)),
        )
        return None if lead <= 2 * noise else first  # a nan error (single runs) compares False, so the lead counts

    def left_out(self, metrics: Sequence[str]) -> list[str]:
        """Return one line for each set of runs or values that the means of these metrics leave out."""
        lines = []
        for group in self.groups:
            total = len(group.members)
            gone = [member.status for member in group.members if member not in group.counted]
            if gone:
                kinds = ", ".join(f"{gone.count(kind)} {kind}" for kind in dict.fromkeys(gone))
                lines.append(f"{group.label}: {len(gone)} of {total} runs not in the means ({kinds})")
            for metric in metrics:
                if count := group.broken(metric):
                    where = f"{count} of {total} runs"
                    lines.append(f"{group.label}: {metric} is nan or infinite in {where}, not in the mean")
        return lines

    def write_csv(self, path: Path) -> None:
        """Write one row per run: directory, status, the hyperparameters that differ (with `together`), every metric."""
        keys = [key for name in self.varying for key in (name, *self.together.get(name, []))]
        seeds = [
            key for key in sorted({k for m in self.members for k in m.hyperparameters if _is_seed(k)}) if ":" not in key
        ]
        names = sorted({name for member in self.members for name in member.metrics}, key=_rank)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(distinct_names(["run", "status", *keys, *seeds], names))
            for group in self.groups:
                for member in group.members:
                    hyperparameters = [
                        "" if (v := member.hyperparameters.get(key)) is None else v for key in (*keys, *seeds)
                    ]
                    results = [member.metrics.get(name, "") for name in names]
                    writer.writerow([member.run.folder, member.status, *hyperparameters, *results])


def compare_runs(references: Sequence[str | Path], outputs: Path, metrics: Sequence[str] = ()) -> Comparison:
    """Compare all runs that the references select.

    Args:
        references: run directories, sweep directories, any directory of runs, or first letters of fingerprints.
        outputs: directory in which fingerprints are looked up.
        metrics: the metrics to show; empty for the most informative ones.

    Raises:
        UserError: A reference selects no run, or no run has a metric.
    """
    runs: dict[str, Run] = {}
    for reference in references:
        for run in find_runs(reference, outputs):
            runs.setdefault(str(run.folder.resolve()), run)
    members = [Member(run) for run in runs.values()]
    for metric in metrics:
        known = {name for member in members for name in member.metrics}
        if metric not in known:
            fix = f"type one of: {', '.join(sorted(known))}"
            raise UserError("no run has it", fix=fix, option="--metric", value=metric)
    return Comparison(members, list(metrics))


def varying(members: Sequence[Member]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the hyperparameters in which runs differ, and for each those of its group that change exactly with it.

    A difference of the stage takes the hyperparameters of every group with it. A hyperparameter that only some runs
    have counts if those runs differ in it. Otherwise it belongs to an option that differs, and counts only if no other
    hyperparameter distinguishes those runs from the rest. Seeds are left out. Runs in which all of these
    hyperparameters are equal therefore differ only in seeds.
    """
    order: dict[str, None] = {}
    for member in members:
        order.update(dict.fromkeys(member.hyperparameters))
    columns: dict[str, tuple[Value, ...]] = {}
    others: dict[str, tuple[Value, ...]] = {}
    twice = _redundant_keys(members, order)
    for key in order:
        if key in twice or _is_seed(key):
            continue
        present = {_same(member.hyperparameters[key]) for member in members if key in member.hyperparameters}
        column = tuple(_same(member.hyperparameters.get(key)) for member in members)
        (others if len(present) < 2 else columns)[key] = column

    kept: list[str] = []
    together: dict[str, list[str]] = {}
    for key, column in columns.items():
        leaf = key.partition(": ")[2] or key
        # An ancestor's hyperparameter that repeats the run's own (a sweep over something that all steps share).
        if any((other.partition(": ")[2] or other) == leaf and columns[other] == column for other in kept):
            continue
        # A single choice of an option sets several hyperparameters of its group.
        group = key.rpartition(": ")[2].split(".")[0]
        twin = next(
            (
                other
                for other in kept
                if (
                    other == "stage"
                    or other.rpartition(": ")[2].split(".")[0] == group
                    and other.rpartition(": ")[0] == key.rpartition(": ")[0]
                )
                and _partition(columns[other]) == _partition(column)
            ),
            None,
        )
        if twin is not None:
            together.setdefault(twin, []).append(key)
        else:
            kept.append(key)

    distinguished = _partition(
        tuple(zip(*(columns[key] for key in kept), strict=True)) if kept else (None,) * len(members)
    )
    for key, column in others.items():
        finer = _partition(tuple(zip(distinguished, column, strict=True)))
        if finer != distinguished:
            kept.append(key)
            distinguished = finer
    return kept, together


def _redundant_keys(members: Sequence[Member], keys: Iterable[str]) -> set[str]:
    """Return the redundant keys of mappings: the whole if all have the same keys, else the single keys."""
    found: set[str] = set()
    for key in keys:
        values = [member.hyperparameters[key] for member in members if key in member.hyperparameters]
        mappings = [value for value in values if isinstance(value, MappingText)]
        if not mappings:
            continue
        if len(mappings) == len(values) and len({mapping.names for mapping in mappings}) == 1:
            found.add(key)
        elif all(mapping.plain for mapping in mappings):
            found |= {f"{key}.{name}" for mapping in mappings for name in mapping.names}
    return found


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Return the last part of each dotted key; more parts where two would be equal."""
    keys = list(keys)
    short = {}
    for key in keys:
        parts = key.split(".")
        for length in range(1, len(parts) + 1):
            name = ".".join(parts[-length:])
            if sum(other == name or other.endswith(f".{name}") or other.endswith(f": {name}") for other in keys) == 1:
                break
        owner, _, _ = key.partition(": ")
        short[key] = f"{owner} {name}" if ": " in key and ": " not in name else name
    return short


def show(value: Value, digits: int = 4) -> str:
    """Return a value as text for a reader."""
    if value is None:
        return ""
    if isinstance(value, float):
        if value == 0 or 1e-3 <= abs(value) < 1e5:
            return f"{value:.{digits}g}"
        return f"{value:.{digits}g}".replace("e-0", "e-").replace("e+0", "e+")
    return str(value)


def cell(group: Group, metric: str) -> str:
    """Return the text of a table cell: the mean and its error over seeds; for a cost only the mean."""
    mean = group.mean(metric)
    if metric in COSTS and not math.isnan(mean):
        return f"{mean:,.0f}" if mean >= 100 else show(mean, 3)
    broken = group.broken(metric)
    if broken and not group.values(metric):
        return "nan"
    return with_error(mean, group.error(metric)) + (f" ({broken} nan)" if broken else "")


def with_error(mean: float, error: float) -> str:
    """Return `0.512 ± 0.014`, or only the mean if the error is unknown."""
    if math.isnan(mean):
        return ""
    if math.isnan(error):
        return show(mean)
    if error <= 1e-9 * abs(mean):  # equal, up to rounding
        return f"{show(mean)} ± 0"
    digits = max(0, 1 - math.floor(math.log10(error)))  # two digits of the error, and the mean to the same place
    return f"{mean:.{digits}f} ± {error:.{digits}f}" if digits <= 6 else f"{mean:.3g} ± {error:.2g}"


def _rank(metric: str) -> tuple[int, int, str]:
    if metric in COSTS or _UNINFORMATIVE.match(metric):
        return len(_INFORMATIVE) + 1, 0, metric
    place = next((i for i, pattern in enumerate(_INFORMATIVE) if re.search(pattern, metric)), len(_INFORMATIVE))
    # Held-out metrics come before training metrics, because they measure generalisation.
    return place, 0 if metric.startswith("after_") else 1 if metric.startswith("val/") else 2, metric


def _is_seed(key: str) -> bool:
    return re.split(r"[.: ]+", key)[-1] == "seed"


def _same(value: Value) -> Value:
    """Return 1.0 as 1, because they are the same setting."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _partition(column: Sequence[Hashable]) -> tuple[int, ...]:
    """Return the pattern of equal entries, by which a hyperparameter partitions the runs, independent of the values."""
    first: dict[Hashable, int] = {}
    return tuple(first.setdefault(value, len(first)) for value in column)


def _order(value: Value) -> tuple[int, float, str]:
    if value is None:
        return 0, 0.0, ""
    if isinstance(value, int | float):
        return 1, float(value), ""
    return 2, 0.0, value
