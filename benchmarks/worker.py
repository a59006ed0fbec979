"""Child process of a benchmark: run one side of one case. ``python -m benchmarks.worker JOB.json``."""

import sys
from importlib import import_module

from benchmarks.gate import Gate, Job


def main(path: str) -> None:
    """Import the module of the case's family, and run its function ``ours`` or ``peer``."""
    job = Job.read(path)
    gate = Gate(job)
    getattr(import_module(f"benchmarks.{job.case['family']}"), job.side)(job, gate)


if __name__ == "__main__":
    main(sys.argv[1])
