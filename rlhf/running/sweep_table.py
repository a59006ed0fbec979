"""Results of a sweep: what its jobs vary, the table results.csv, and the lines on the terminal."""

import csv
from collections.abc import Sequence
from pathlib import Path

from hydra.core.utils import filter_overrides

from rlhf.running.job import Job
from rlhf.storage.metrics_file import distinct_names


class SweepTable:
    """Jobs of a sweep as a table, which results.csv in the sweep's directory and the terminal show.

    Args:
        folder: The directory of the sweep.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: list[Job] = []  # of all calls: an optimising sweeper launches in rounds

    def write(self) -> None:
        """Write results.csv: one row per job, with the values that differ, the status and the final metrics."""
        varied = self._varied()
        metrics = list(dict.fromkeys(name for job in self.jobs for name in job.result.get("metrics") or {}))
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / ".results.csv"
        with scratch.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            own = ["job", *varied, "status", "value", "seconds", "run", "error"]
            # A metric may be named value, too (the loss of a value head).
            named = distinct_names(own, metrics)[len(own) :]
            writer.writerow([*own[:-3], *named, *own[-3:]])
            for job in self.jobs:
                pairs, found = assigned(job.overrides), job.result.get("metrics") or {}
                writer.writerow(
                    [
                        job.folder.name,
                        *(pairs.get(key, "") for key in varied),
                        job.status,
                        job.result.get("value"),
                        *(found.get(name) for name in metrics),
                        round(job.seconds, 1),
                        job.result.get("run"),
                        job.error if job.status in ("failed", "timeout") else "",
                    ]
                )
        scratch.replace(self.folder / "results.csv")

    def label(self, job: Job) -> str:
        """Return the job's number and the values in which it differs from the others."""
        pairs = assigned(job.overrides)
        varied = " ".join(f"{key}={pairs[key]}" for key in self._varied() if key in pairs)
        width = len(str(self.jobs[-1].number))
        return f"[{job.number:>{width}}] {varied}"

    def outcome(self, job: Job) -> str:
        """Return the line of a job that has ended."""
        value = job.result.get("value")
        text = {
            "finished": f"finished{'' if value is None else f', {value:.4g}'}, {job.result.get('run') or job.folder}",
            "stopped": f"stopped, can be resumed; see {job.console}",
        }.get(job.status, f"FAILED: {job.error}")
        return f"{self.label(job)} {text} ({job.seconds:.0f} s)"

    def summary(self, jobs: Sequence[Job]) -> str:
        """Return the lines about ``jobs`` once all have ended: how many finished, and which did not."""
        failed = [job for job in jobs if job.status != "finished"]
        head = f"{len(jobs) - len(failed)} of {len(jobs)} jobs finished; results in {self.folder / 'results.csv'}"
        return "\n".join([head, *(f"  {self.label(job)} {job.status}; {job.console}" for job in failed)])

    def _varied(self) -> list[str]:
        """Return the keys whose values differ between the jobs; all keys if none does."""
        table = [assigned(job.overrides) for job in self.jobs]
        keys = list(dict.fromkeys(key for row in table for key in row))
        return [key for key in keys if len({row.get(key) for row in table}) > 1] or keys


def assigned(overrides: Sequence[str]) -> dict[str, str]:
    """Return the values that overrides assign, by key; Hydra's own keys are left out."""
    return {key.lstrip("+~"): value for key, _, value in (word.partition("=") for word in filter_overrides(overrides))}
