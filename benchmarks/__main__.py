"""Command line of the benchmarks: ``python -m benchmarks``."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.cases import CASES
from benchmarks.machine import DTYPES, describe, matrix_rate
from benchmarks.models import NAMES
from benchmarks.peer_environment import make_environment
from benchmarks.runner import SIDES, Settings, run_case, with_model
from rlhf.console import silence_libraries
from rlhf.errors import UserError


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    made = argparse.ArgumentParser("python -m benchmarks", description="Time our stages against peer libraries.")
    made.add_argument("--case", action="append", choices=CASES, help="a case; repeat for several; default: all")
    made.add_argument("--model", choices=NAMES, help="model of all cases; default: each case's own")
    made.add_argument("--batch", type=positive, help="rows, pairs or prompts per step; default: each case's own")
    made.add_argument("--steps", type=positive, help="optimizer steps in a repetition; default: 1, on a GPU 5")
    made.add_argument("--repeats", type=positive, default=5, help="repetitions of each side; default: 5")
    made.add_argument("--warmup", type=positive, help="steps that are not measured; default: 1, on a GPU 3")
    made.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    made.add_argument("--dtype", choices=DTYPES, help="arithmetic; default: fp32, on a GPU bf16 (mixed)")
    made.add_argument("--ours", action="store_true", help="measure our side alone")
    made.add_argument("--apart", action="store_true", help="run one side after the other, not both alternately")
    made.add_argument("--out", type=Path, default=Path("outputs/benchmarks"), help="directory of the JSON file")
    made.add_argument("--profile", type=Path, help="directory for operator profiles; they slow the measured steps down")
    made.add_argument("--peer-environment", action="store_true", help="make the environment of the case ppo's peer")
    return made


def positive(word: str) -> int:
    """Return a number of 1 or more."""
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is not 1 or more")
    return number


def main(words: Sequence[str] | None = None) -> int:
    """Run the chosen cases; print a table and write the JSON file. Return 1 if one of our sides failed."""
    options = parser().parse_args(words)
    if options.peer_environment:
        try:
            print(make_environment())
        except UserError as error:
            print(error, file=sys.stderr)
            return error.exit_code
        return 0
    silence_libraries()
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        print(UserError("no GPU is present", "type --device cpu", "--device", device), file=sys.stderr)
        return UserError.exit_code
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = device == "cuda"
    settings = Settings(
        device=device,
        dtype=options.dtype or ("bf16" if gpu else "fp32"),
        warmup=options.warmup or (3 if gpu else 1),
        steps=options.steps or (5 if gpu else 1),
        repeats=options.repeats,
        sides=("ours",) if options.ours else SIDES,
        apart=options.apart,
        profile=options.profile,
    )
    rate = 0.0
    rows: list[dict[str, Any]] = []
    content = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe(device),
        "settings": asdict(settings) | {"profile": None if options.profile is None else str(options.profile)},
        "rows": rows,
    }
    for name in options.case or CASES:
        case = with_model(CASES[name], options.model, options.batch)
        print(f"{case.name}: {case.model} against {case.peer}", file=sys.stderr, flush=True)
        rate = max(rate, matrix_rate(device, settings.dtype))  # other load on the machine can only lower it
        rows.append(run_case(case, settings, rate))
        path = report.write(options.out, content)  # after each case, so that an interruption loses one
    print(report.table(rows))
    print(f"matrix rate {rate / 1e9:.0f} GFLOP/s; {path}")
    return int(any("error" in row["ours_result"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
