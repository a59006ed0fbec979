"""Roofline of the machine (Williams et al. 2009), and the memory traffic that a training step needs at least.

A step of F FLOPs that moves B bytes between memory and processor takes at least max(F / rate, B / bandwidth) seconds:
below the ridge point rate / bandwidth (FLOP per byte) memory is the limit, above it arithmetic. Counted in B are, at
four bytes a number,

    matrix product [n, a] x [a, b]   n a + a b + n b, once for each product: both operands are read, the result written
    attention                        queries, keys, values and result of each position once for each pass; in a decode
                                     step the keys and values of the whole context
    AdamW                            7 numbers a weight: it, its gradient and two moments read; all but the gradient
                                     written

Norms, activations and softmax are not counted. The caches of the processor hold small operands, so a small model can
exceed this bound.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.flops import Shape
from benchmarks.machine import seconds as clock

BYTES = 4  # of a number in fp32
OPTIMIZER = 7  # numbers moved for each weight by AdamW
SIZES = (64, 128, 256, 512, 1024, 2048)  # rows of the square matrices
ELEMENTS = 1 << 25  # numbers in each of the three arrays of the triad: 128 MiB, beyond any cache


@dataclass(frozen=True)
class Roofline:
    """Measured limits of a machine in fp32.

    Attributes:
        rates: Rows of square matrices -> rate of their product, FLOP/s.
        bandwidth: Bytes per second of the triad a = b + s c (STREAM), its reads and its write.
    """

    rates: dict[int, float]
    bandwidth: float

    @property
    def rate(self) -> float:
        """Best rate of a matrix product, FLOP/s."""
        return max(self.rates.values())

    @property
    def ridge(self) -> float:
        """Return the intensity above which arithmetic is the limit, FLOP per byte."""
        return self.rate / self.bandwidth

    def bound(self, intensity: float) -> float:
        """Return the highest rate that is possible at an intensity, FLOP/s."""
        return min(self.rate, intensity * self.bandwidth)


def measure(seconds: float = 0.5) -> Roofline:
    """Measure the machine with the threads that torch uses: the best repetition of each product and of the triad."""
    rates = {}
    for size in SIZES:
        a, b, out = (torch.randn(size, size) for _ in range(3))
        rates[size] = 2 * size**3 / _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), seconds)  # type: ignore[misc]
    a, b, c = (torch.ones(ELEMENTS) for _ in range(3))
    triad = _best(lambda: torch.add(b, c, alpha=2.0, out=a), seconds)
    return Roofline(rates, 3 * BYTES * ELEMENTS / triad)


def _best(work: Callable[[], object], seconds: float) -> float:
    """Return the time of the fastest repetition; at least three are made."""
    work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        begin = clock()
        work()
        times.append(clock() - begin)
    return min(times)


def parameters(shape: Shape) -> int:
    """Return the weights of the matrices of a model whose embedding is its projection, too."""
    return shape.layers * sum(a * b for a, b in shape.linear_layers) + shape.hidden * shape.vocabulary


def forward_bytes(shape: Shape, tokens: int, targets: int, context: int | None = None) -> int:
    """Return the least traffic of a forward pass.

    Args:
        shape: Sizes of the model.
        tokens: Tokens through the decoder.
        targets: Positions projected to the vocabulary.
        context: Positions whose keys and values are read; None: the tokens' own.
    """
    linear = sum(tokens * a + a * b + tokens * b for a, b in shape.linear_layers)
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    attention = 2 * tokens * queries + 2 * keys * (tokens if context is None else context)
    projection = targets * (shape.hidden + shape.vocabulary) + shape.hidden * shape.vocabulary * bool(targets)
    return BYTES * (shape.layers * (linear + attention) + projection)


def training_bytes(shape: Shape, tokens: int, targets: int) -> int:
    """Return the least traffic of an optimizer step: a forward pass, the two products of the backward pass, AdamW."""
    return 3 * forward_bytes(shape, tokens, targets) + BYTES * OPTIMIZER * parameters(shape)


def sampling_bytes(shape: Shape, prompts: Sequence[int], samples: int, response: int) -> int:
    """Return the least traffic of sampling with a cache: the prompts in one pass, then a decode step for each token.

    Args:
        shape: Sizes of the model.
        prompts: Length of each prompt, tokens.
        samples: Responses to each prompt, which share its keys and values.
        response: Length of a response, tokens; all are sampled at the same time.
    """
    rows = samples * len(prompts)
    decode = sum(
        forward_bytes(shape, rows, rows, context=sum(prompts) + rows * (done + 1)) for done in range(response - 1)
    )
    return forward_bytes(shape, sum(prompts), len(prompts)) + decode


def group_bytes(shape: Shape, prompts: Sequence[int], samples: int, response: int) -> int:
    """Return the least traffic of a step of GRPO: sampling, the reference's pass, and an update over shared prompts."""
    targets = samples * response * len(prompts)
    tokens = sum(prompts) + targets
    reference = forward_bytes(shape, tokens, targets)
    return sampling_bytes(shape, prompts, samples, response) + reference + training_bytes(shape, tokens, targets)
