"""Benchmark of the CPU seconds of common commands: a finished pipeline, a report, the list of runs, a text stream.

    python benchmarks/commands.py [finished|report|list|stream]...

Seconds are user and system time of one process, the median of three, so that other load on the machine matters less. A
fixed loop of Python is timed too: divide by it to compare machines. `report` and `list` read synthetic runs with the
real configs and lineage of a pipeline; `finished` trains a pipeline first (two CPU minutes).
"""

import hashlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

BETAS, SEEDS, ROWS = 40, 5, 300  # of the report: 200 runs, each with a metrics.csv of ROWS rows
LISTED = 2000
MEGABYTES = 10
REPEATS = 3


def cpu_seconds(words: list[str], folder: Path, **environment: str) -> float:
    """Run a command to its end; return its user and system time."""
    process = subprocess.Popen(words, cwd=folder, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)}: exit status {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def rlhf(*words: str) -> list[str]:
    """Return the command line of `rlhf`, run by this Python."""
    return [sys.executable, "-m", "rlhf.cli", *words]


def median(words: list[str], folder: Path, **environment: str) -> float:
    """Return the median CPU time of a command."""
    return sorted(cpu_seconds(words, folder, **environment) for _ in range(REPEATS))[REPEATS // 2]


def finished(folder: Path) -> float:
    """Measure a finished pipeline that is typed again."""
    words = rlhf("pipeline=instructgpt", "debug=smoke")
    own_cache = str(folder / "cache")
    cpu_seconds(words, folder, RLHF_CACHE=own_cache)
    return median(words, folder, RLHF_CACHE=own_cache)


def report(folder: Path) -> float:
    """Measure `rlhf report` of a sweep of PPO over beta and seed."""
    chosen = [(0.005 * (1 + i), seed) for i in range(BETAS) for seed in range(SEEDS)]
    made_up_sweep(folder, chosen, ROWS)
    return median(rlhf("report", "outputs/ppo"), folder)


def listed(folder: Path) -> float:
    """Measure `rlhf runs list`."""
    made_up_sweep(folder, [(0.05, seed) for seed in range(LISTED - 4)], rows=0)
    return median(rlhf("runs", "list"), folder)


def made_up_sweep(folder: Path, chosen: list[tuple[float, int]], rows: int) -> None:
    """Write the runs of a pipeline as if they had been trained; the last step has one run for each beta and seed.

    Args:
        folder: the working directory, below which outputs/ is written.
        chosen: (beta, seed) of each run of the last step.
        rows: of each metrics.csv; every tenth has held-out metrics.
    """
    from rlhf.planning.plan import plan
    from rlhf.planning.step import Step
    from rlhf.running.pipeline import _lineage
    from rlhf.runs import run_directory
    from rlhf.runs.run_directory import Run
    from rlhf.storage import files
    from rlhf.storage.metrics_file import MetricsFile
    from rlhf.testing import compose_config

    def write(step: Step, metrics: dict[str, float]) -> None:
        run = Run(step.folder)
        run.begin(step.config, _lineage(step), "rlhf pipeline=instructgpt")
        content = {"stage": step.stage, "headline": step.headline, "metrics": metrics, "wall_s": 93.0}
        content |= {"value": metrics.get(step.headline), "tokens_per_s": 5120.0, "peak_memory_bytes": {"cpu": 7.4e8}}
        files.write_json(step.folder / "summary.json", content)
        run.write_manifest()
        run.write_status("finished", ended=run_directory.now())

    typed = os.getcwd()
    os.chdir(folder)
    try:
        *before, last = plan(compose_config("pipeline=instructgpt")).steps
        for step in before:
            write(step, {step.headline: 0.8})
        for beta, seed in chosen:
            fingerprint = "f" + hashlib.sha256(f"{beta} {seed}".encode()).hexdigest()[1:]
            config = json.loads(json.dumps(last.config)) | {"seed": seed}
            config["objective"]["beta"] = beta
            place = last.folder.with_name(fingerprint[: run_directory.LETTERS])
            place.mkdir(parents=True)
            text, end = training(beta, seed, rows)
            if rows:
                (place / "metrics.csv").write_text(text, encoding="utf-8")
                assert MetricsFile(place / "metrics.csv") is not None
            write(
                Step("align", "ppo", config, fingerprint, place, last.inputs, last.parents, last.headline),
                end,
            )
    finally:
        os.chdir(typed)


def training(beta: float, seed: int, rows: int) -> tuple[str, dict[str, float]]:
    """Return a metrics.csv and its final values."""
    draw = random.Random(f"{beta} {seed}")
    top, far, shift = 0.9 / (1 + beta), 22 / (1 + 14 * beta), draw.gauss(0, 0.012)
    lines = ["step,score,gold,kl,entropy,loss,length,gradient_norm,learning_rate,val/gold,val/kl,val/score"]
    numbers: list[float] = []
    for step in range(max(rows, 10)):
        grown = 1 - math.exp(-4 * step / max(rows, 10))
        gold, kl = top * grown + shift, far * grown
        numbers = [3 * gold + draw.gauss(0, 0.12), gold + draw.gauss(0, 0.02), kl * (1 + draw.gauss(0, 0.08))]
        numbers += [2 - 0.6 * grown, 0.4 * math.exp(-step / 20) + draw.gauss(0, 0.02), 20 + draw.gauss(0, 1), 0.7, 1e-4]
        held_out = [gold, kl, 3 * gold] if step % 10 == 9 else []
        lines.append(
            ",".join([str(step), *(f"{number:.9g}" for number in [*numbers, *held_out])] + [""] * (3 - len(held_out)))
        )
    names = lines[0].split(",")[1:]
    return "\n".join(lines) + "\n", dict(zip(names, [*numbers, gold, kl, 3 * gold], strict=True))


def stream(folder: Path) -> float:
    """Measure loading and encoding of 10 MB of text as pretraining does with data.streaming=true."""
    from rlhf.data.testbed.world import Testbed

    texts = [document.text for document in Testbed().texts(4000, 0)]
    draw, size = random.Random(0), 0
    with (folder / "text.txt").open("w", encoding="utf-8") as file:
        while size < MEGABYTES * 1_000_000:
            size += file.write(" ".join(draw.sample(texts, 4)) + "\n")
    return median([sys.executable, __file__, "--stream", "text.txt"], folder, RLHF_CACHE=str(folder / "cache"))


def stream_file(path: str) -> None:
    """Load and encode a file of text, one document a line, with a vocabulary of 1024."""
    from itertools import islice

    from rlhf.data.data import Data
    from rlhf.data.tokenizer import train_tokenizer

    with open(path, encoding="utf-8") as file:
        tokenizer = train_tokenizer(list(islice(file, 2000)), 1024)
    split = Data("text", path, None, 0.05, 64, streaming=True).load()
    for part in ("train", "validation"):
        split.encode(tokenizer, part)


WAYS: dict[str, tuple[Callable[[Path], float], str]] = {
    "finished": (finished, "pipeline=instructgpt, five steps, finished, typed again"),
    "report": (report, f"rlhf report of {BETAS * SEEDS} runs, {ROWS} rows each"),
    "list": (listed, f"rlhf runs list of {LISTED} runs"),
    "stream": (stream, f"{MEGABYTES} MB of text streamed: loaded, split, encoded"),
}


def loop() -> float:
    """Return the CPU time of a fixed amount of Python."""
    start, total = time.process_time(), 0
    for number in range(10_000_000):
        total += number & 3
    return time.process_time() - start


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stream"]:
        stream_file(sys.argv[2])
        sys.exit()
    print(f"ten million additions: {loop():.2f} CPU s")
    for name in sys.argv[1:] or WAYS:
        measure, what = WAYS[name]
        with tempfile.TemporaryDirectory() as temporary:
            print(f"{what}: {measure(Path(temporary)):.1f} CPU s", flush=True)
