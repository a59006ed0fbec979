"""Benchmark of token log-probabilities and their gradient: our chunked projection against TRL on full logits."""

import statistics
import subprocess
import sys
import time

import torch
from torch import nn

from benchmarks.gate import largest_resident_bytes


def setting(batch: int = 8, length: int = 256, width: int = 576, vocabulary: int = 49152, counted: float = 0.5):
    """Return hidden states, head, ids and mask of SmolLM2-135M's shape."""
    torch.manual_seed(0)
    hidden = torch.randn(batch, length, width, requires_grad=True)
    head = nn.Linear(width, vocabulary, bias=False)
    ids = torch.randint(vocabulary, (batch, length))
    mask = torch.rand(batch, length) < counted
    return hidden, head, ids, mask


def ours(hidden, head, ids, mask):
    """Project only the counted positions, in chunks that the backward pass recomputes."""
    from rlhf.functional.logprobs import token_logprobs

    return token_logprobs(hidden[mask], ids[mask], head)[0].sum()


def trl(hidden, head, ids, mask):
    """Compute all logits, then TRL's gather."""
    from trl.trainer.utils import selective_log_softmax

    return (selective_log_softmax(head(hidden), ids) * mask).sum()


WAYS = {"ours": ours, "trl": trl}


def run(name: str) -> None:
    """Measure one way in this process; print seconds (median of 5) and peak memory of the process in MiB."""
    inputs = setting()
    WAYS[name](*inputs).backward()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        WAYS[name](*inputs).backward()
        seconds.append(time.perf_counter() - start)
    print(statistics.median(seconds), largest_resident_bytes() / 2**20)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(sys.argv[1])
    else:
        rows = {}
        for name in WAYS:  # one process each, because peak memory cannot be reset
            out = subprocess.run(
                [sys.executable, "-m", "benchmarks.logprobs", name],
                check=True,
                capture_output=True,
                text=True,
                encoding="utf-8",
            ).stdout
            rows[name] = [float(word) for word in out.split()[-2:]]
            print(f"{name:5} {rows[name][0]:.2f} s  {rows[name][1]:.0f} MiB peak")
        print(f"ours / trl: time {rows['ours'][0] / rows['trl'][0]:.2f}, peak {rows['ours'][1] / rows['trl'][1]:.2f}")
