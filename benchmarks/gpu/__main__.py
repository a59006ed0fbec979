"""Command line of the GPU checks: ``python -m benchmarks.gpu``; ``benchmarks/gpu.sh`` installs what is missing."""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.checks import checks
from benchmarks.gpu.page import write_page
from benchmarks.gpu.runner import ROOT, Settings, run_checks
from rlhf.storage.files import write_json

BUDGET = 540.0  # seconds
SMALL_BUDGET = 1800.0  # the processors of a machine without a GPU may be slow
FAILURES = ("failed", "timeout", "killed", "out of memory")


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    made = argparse.ArgumentParser("python -m benchmarks.gpu", description="Check the framework on one GPU.")
    made.add_argument("--small", action="store_true", help="tiny models on the CPU: shows that every check runs")
    made.add_argument("--check", action="append", help="a check; repeat for several; default: all")
    made.add_argument("--budget", type=float, help=f"seconds of the whole run; default: {BUDGET:.0f}")
    made.add_argument("--jobs", type=int, default=4, help="checks beside each other, if they measure nothing")
    made.add_argument("--commit", help="commit of the sources; default: that of the repository")
    made.add_argument("--out", type=Path, help="file; default: $OUT/gpu.json, or docs/gpu.json")
    made.add_argument("--page", action="store_true", help="write docs/gpu.md from docs/gpu.json, and run nothing")
    return made


def main(words: Sequence[str] | None = None) -> int:
    """Run the checks and write the file; return 1 if one failed."""
    given = list(sys.argv[1:] if words is None else words)
    options = parser().parse_args(given)
    if options.page:
        print(write_page(ROOT / "docs"))
        return 0
    known = checks(options.small)
    chosen = [check for check in known if not options.check or check.name in options.check]
    unknown = set(options.check or ()) - {check.name for check in known}
    if unknown:
        parser().error(f"no such check: {', '.join(sorted(unknown))} (one of {', '.join(c.name for c in known)})")
    folder = Path(os.environ.get("OUT") or ROOT / "docs")
    out = (
        options.out
        or (Path(tempfile.gettempdir()) if options.small and "OUT" not in os.environ else folder) / "gpu.json"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        device="cpu" if options.small else "cuda",
        small=options.small,
        budget=options.budget or (SMALL_BUDGET if options.small else BUDGET),
        jobs=options.jobs,
        folder=Path(tempfile.mkdtemp(prefix="gpu-")),
        threads=1 if options.small else max(1, min(8, (os.cpu_count() or 1) // options.jobs)),
    )
    began = time.monotonic()
    content: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["benchmarks/gpu.sh", *given]),
        "commit": options.commit or commit(),
        "small": options.small,
        "budget": settings.budget,
    }

    def write(results: list[dict[str, Any]]) -> None:
        content["seconds"] = round(time.monotonic() - began, 1)
        write_json(out, content | {"checks": results})

    print(f"logs: {settings.folder}", file=sys.stderr, flush=True)
    statuses: list[str] = []

    def record(results: list[dict[str, Any]]) -> None:
        statuses[:] = [result["status"] for result in results]
        write(results)

    run_checks(chosen, settings, record)
    print(f"{out}: {', '.join(f'{statuses.count(name)} {name}' for name in dict.fromkeys(statuses))}")
    return int(any(status in FAILURES for status in statuses))


def commit() -> str:
    """Return the commit of the sources; "" outside of a repository or without git."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, encoding="utf-8", check=False
        )
    except OSError:
        return ""
    return found.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
