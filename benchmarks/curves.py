"""Cost of our training step as model, length, batch and number of responses grow: ``python -m benchmarks.curves``.

Each point is a whole step of the stage (`Trainer.fit`, as in the other benchmarks), measured in a process of its own
that is forked after the imports. On one thread its seconds are CPU seconds, which other load on the machine disturbs
less. Rows of SFT are random tokens of equal length; prompts of GRPO come from the testbed or alpaca. The results are
written after each point to curves.json, from which the figures are drawn; a point that the file has already is not
measured again unless ``--again``.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import models, roofline
from benchmarks.cases import Case, count_amounts
from benchmarks.gate import Gate, Job, largest_resident_bytes, resident_bytes
from benchmarks.machine import describe
from benchmarks.machine import seconds as clock
from benchmarks.roofline import Roofline, group_bytes, training_bytes
from benchmarks.rows import build_rows
from rlhf.storage import files

FILE = "curves.json"
FIGURES = Path(__file__).resolve().parents[1] / "docs" / "performance"

SFT = Case("sft", "supervised", "sft", model="12m", batch=4, length=256)
GRPO = Case("grpo", "groups", "grpo", model="12m", batch=2, samples=4)


@dataclass(frozen=True)
class Point:
    """Case of a curve, at one value of what grows."""

    curve: str
    value: str
    case: Case

    @property
    def key(self) -> str:
        """Name of the point in the file."""
        return f"{self.curve}={self.value}"


#: curve -> its points, in the order in which they are measured
CURVES: dict[str, list[Point]] = {
    "model": [
        Point("model", name, replace(SFT, model=name, batch=8, length=128)) for name in ("tiny", "12m", "31m", "135m")
    ],
    "length": [Point("length", str(length), replace(SFT, length=length)) for length in (128, 256, 512, 1024)],
    "batch": [Point("batch", str(batch), replace(SFT, batch=batch)) for batch in (1, 2, 4, 8, 16)],
    "samples": [Point("samples", str(count), replace(GRPO, samples=count)) for count in (2, 4, 8, 16)],
}


class Stopwatch(Gate):
    """Gate that stops no step: it records the seconds and the memory of each and ends the process after the last."""

    def __init__(self, job: Job, pipe: Connection) -> None:
        self.job, self._pipe = job, pipe
        self._passed, self._base, self._began = 0, 0, 0.0
        self._seconds: list[float] = []
        self._lengths: list[float] = []

    def start(self) -> None:
        """Record the memory before the model is loaded."""
        self._base = resident_bytes()

    @property
    def warming(self) -> bool:
        """Return False: rows are not recorded, since no peer is compared."""
        return False

    def end_step(self, **measured: float) -> None:
        """Record a step; after the last one send the result and end the process."""
        now = clock()
        if self._passed >= self.job.warmup:
            self._seconds.append(now - self._began)
            self._lengths += [measured["response"]] if "response" in measured else []
        self._passed += 1
        if len(self._seconds) == self.job.repeats:
            memory = max(0, largest_resident_bytes() - self._base)
            self._pipe.send({"seconds": self._seconds, "memory": memory, "lengths": self._lengths})
            sys.exit(0)
        self._began = clock()


def equal_rows(case: Case, vocabulary: int) -> list[dict[str, Any]]:
    """Return rows of random tokens, all as long as the case allows; the first quarter of each is its prompt."""
    draw = random.Random(f"{case.batch}/{case.length}")
    prompt = case.length // 4
    return [
        {
            "ids": [draw.randrange(vocabulary) for _ in range(case.length)],
            "mask": [False] * prompt + [True] * (case.length - prompt),
        }
        for _ in range(case.batch)
    ]


def measure(point: Point, limits: Roofline, repeats: int) -> dict[str, Any]:
    """Measure a point; return its entry of the file, which has ``error`` in place of numbers if the process failed."""
    from transformers import AutoTokenizer

    folder = models.model_folder(point.case.model)
    shape = models.shape(folder)
    case = point.case
    if case.rows_of == "prompts":
        rows, _ = build_rows(case, AutoTokenizer.from_pretrained(folder))
    else:
        rows = equal_rows(case, shape.vocabulary)
    entry: dict[str, Any] = {"curve": point.curve, "value": point.value, "config": asdict(case)}
    found = _forked(case, folder, rows, repeats)
    if found is None:
        return entry | {"error": "the process ended without a result"}
    response = round(statistics.mean(found["lengths"])) if found["lengths"] else case.response
    amounts = count_amounts(case, shape, rows, response)
    if case.rows_of == "prompts":
        moved = group_bytes(shape, [len(row["ids"]) for row in rows], case.samples, response)
    else:
        moved = training_bytes(shape, case.batch * case.length, sum(sum(row["mask"]) for row in rows))
    seconds = statistics.median(found["seconds"])
    intensity = amounts.flops / moved
    return entry | {
        "parameters": roofline.parameters(shape),
        "seconds": seconds,
        "all_seconds": found["seconds"],
        "tokens": amounts.tokens,
        "flops": amounts.flops,
        "bytes": moved,
        "intensity": intensity,
        "rate": amounts.flops / seconds,
        "share": amounts.flops / seconds / limits.rate,
        "share_of_roofline": amounts.flops / seconds / limits.bound(intensity),
        "peak_memory_bytes": found["memory"],
    }


def _forked(case: Case, folder: Path, rows: list[dict[str, Any]], repeats: int) -> dict[str, Any] | None:
    """Run the steps of a case in a forked process; return what it measured, None if it failed."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as name:
        job = Job(asdict(case), "ours", str(folder), None, rows, "cpu", "fp32", 1, 1, repeats, name)
        process = context.Process(target=_train, args=(job, sender))
        process.start()
        sender.close()
        try:
            found: dict[str, Any] = receiver.recv()
        except EOFError:
            return None
        finally:
            process.join()
    return found


def _train(job: Job, pipe: Connection) -> None:
    from importlib import import_module

    from benchmarks.ours import train

    os.dup2(2, 1)  # what the stage prints goes to the log
    train(job, Stopwatch(job, pipe), *import_module(f"benchmarks.{job.case['family']}").inputs(job))


def main(words: Sequence[str] | None = None) -> None:
    """Measure the points that are missing, and draw the figures."""
    parser = argparse.ArgumentParser("python -m benchmarks.curves", description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=CURVES, help="a curve; repeat for several; default: all")
    parser.add_argument("--repeats", type=int, default=2, help="measured steps of each point; default: 2")
    parser.add_argument("--again", action="store_true", help="measure the points that the file has already, too")
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw the figures from the file")
    parser.add_argument("--out", type=Path, default=FIGURES, help="directory of the file and the figures")
    options = parser.parse_args(words)
    path = options.out / FILE
    options.out.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    chosen = options.case or list(CURVES)
    if not options.draw:
        if not content or options.again:
            limits = roofline.measure()
            content = {"points": content.get("points", {})}
            content |= {"machine": describe("cpu"), "rates": limits.rates, "bandwidth": limits.bandwidth}
        limits = Roofline({int(size): rate for size, rate in content["rates"].items()}, content["bandwidth"])
        for point in (point for curve in chosen for point in CURVES[curve]):
            if options.again or "seconds" not in content["points"].get(point.key, {}):
                content["points"][point.key] = measure(point, limits, options.repeats)
                files.write_json(path, content)  # after each point, so that an interruption loses one
            print(line(content["points"][point.key]), flush=True)
    from benchmarks.curve_figures import draw

    print(*draw(content, options.out), sep="\n")


def line(entry: dict[str, Any]) -> str:
    """Return a point in one line."""
    head = f"{entry['curve']:<8}{entry['value']:>6}"
    if "error" in entry:
        return f"{head}  {entry['error']}"
    return (
        f"{head}{entry['seconds']:>9.3f} s{entry['share']:>7.0%} of the matrix rate{entry['intensity']:>7.1f} FLOP/byte"
        f"{entry['share_of_roofline']:>7.0%} of the roofline{entry['peak_memory_bytes'] / 1e9:>7.2f} GB"
    )


if __name__ == "__main__":
    main()
