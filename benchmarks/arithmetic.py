"""Benchmark of arithmetic and memory options alone: kept 16-bit copies, recomputed layers, compiled layers.

Options alternate within one process; times are CPU seconds of this process (run it with one thread).
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.models import NAMES
from benchmarks.techniques import build, rows
from rlhf.data.collate import TokenBatch
from rlhf.inspection.memory import AllocationPeak
from rlhf.models.language_model import LanguageModel
from rlhf.models.weight_casts import keep_casts


def step(model: LanguageModel, batch: TokenBatch) -> None:
    """Run a forward and a backward pass of the mean log-probability."""
    model.train().zero_grad()
    logp, _ = model.logprobs(batch, uniform=True)
    (logp.sum() / batch.loss_mask.sum()).backward()


@torch.no_grad()
def decode(model: LanguageModel, rows: int = 8, prompt: int = 32, tokens: int = 24) -> None:
    """Run a prompt and a few decode steps of 8 rows with the projection to the vocabulary."""
    ids = torch.arange(rows * prompt).view(rows, prompt)
    mask = torch.ones(rows, prompt + tokens, dtype=torch.long)
    _, cache = model.step(ids, mask[:, :prompt], torch.arange(prompt).expand(rows, -1))
    for index in range(prompt, prompt + tokens):
        positions = torch.full((rows, 1), index)
        states, cache = model.step(ids[:, :1], mask[:, : index + 1], positions, cache)
        model.head(states)


def compare(work: Mapping[str, Callable[[], None]], repeats: int) -> None:
    """Print the median time of each piece of work, and the median of its ratio to the first one."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, run in work.items():
            start = time.process_time()
            run()
            if repeat:  # the first one warms up
                times[name].append(time.process_time() - start)
    (first, *_) = times.values()
    for name, found in times.items():
        ratio = statistics.median(own / base for own, base in zip(found, first, strict=True))
        print(f"{name:<44}{statistics.median(found):>9.3f} s{ratio:>8.2f}", flush=True)


def casts(name: str, repeats: int) -> None:
    """Compare autocast with kept copies, in a training pass and in decode steps."""
    plain = build(name)
    kept, batch = copy.deepcopy(plain), rows(2, 1, 32, (96, 96))
    keep_casts([kept], torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        works: dict[str, Callable[[LanguageModel], None]] = {
            "decode": decode,
            "training pass": lambda m: step(m, batch),
        }
        for work, run in works.items():
            own = {"casts in every pass": plain, "kept copies": kept}
            compare({f"{work}, {what}": lambda m=m, run=run: run(m) for what, m in own.items()}, repeats)  # type: ignore[misc]


def layers(name: str, repeats: int) -> None:
    """Compare training passes that recompute no, every fourth, every second or every layer."""
    batch, models = rows(4, 1, 1, (511, 511)), {"no layer recomputed": build(name)}
    for every in (4, 2, 1):
        models[f"every {every}th layer"] = copy.deepcopy(models["no layer recomputed"]).gradient_checkpointing(every)
    for what, model in models.items():
        with AllocationPeak([*model.parameters(), *model.buffers()]) as allocated:
            step(model, batch)
        print(f"{what:<44}{allocated.peak / 2**20:>9.0f} MiB", flush=True)
    compare({what: lambda m=m: step(m, batch) for what, m in models.items()}, repeats)  # type: ignore[misc]


def compiled(name: str, repeats: int) -> None:
    """Compare training passes of batches of different lengths with layers that torch.compile compiled one by one."""
    plain, batches = build(name), [rows(2, 1, 32, (64, 64 + more)) for more in (0, 40, 70)]
    fast = copy.deepcopy(plain)
    for layer in fast.base.get_decoder().layers:
        layer.compile(dynamic=True)
    start = time.process_time()
    step(fast, batches[0])
    print(f"{'first pass, compiled':<44}{time.process_time() - start:>9.3f} s", flush=True)
    for batch in batches:
        compare({w: lambda m=m, b=batch: step(m, b) for w, m in (("plain", plain), ("compiled", fast))}, repeats)  # type: ignore[misc]


def main() -> None:
    """Run the cases."""
    cases = {"casts": casts, "layers": layers, "compiled": compiled}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=cases, nargs="+")
    parser.add_argument("--model", choices=[name for name in NAMES if name != "tiny"], default="12m")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    for case in args.case:
        cases[case](args.model, args.repeats)


if __name__ == "__main__":
    main()
