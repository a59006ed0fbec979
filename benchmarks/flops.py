"""FLOPs that an algorithm needs: the lower bound that the share of the machine's matrix rate is computed from.

Counted are the matrix products of a Llama-like decoder (a multiplication and an addition are two FLOPs); norms, rotary
positions, softmax, the optimizer and everything recomputed are not. With D hidden size, L layers, H query heads and G
key-value heads of d dimensions, F feed-forward size and V vocabulary size:

    linear layers   2 L (2 D H d + 2 D G d + 3 D F)    for each token
    attention       4 L H d                            for each pair (query, key) with key <= query
    projection      2 D V                              for each position whose next token is scored or sampled

A backward pass costs twice its forward pass: the gradients of inputs and of weights. Frozen weights (LoRA) need only
the former, and the adapters' own products are added. A prompt that several responses share is counted once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, from its configuration."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """Read the sizes from a Hugging Face configuration, given as an object or as a mapping."""
        values = config if isinstance(config, dict) else config.to_dict()
        heads = values["num_attention_heads"]
        return cls(
            hidden=values["hidden_size"],
            layers=values["num_hidden_layers"],
            heads=heads,
            kv_heads=values.get("num_key_value_heads") or heads,
            head_size=values.get("head_dim") or values["hidden_size"] // heads,
            feed_forward=values["intermediate_size"],
            vocabulary=values["vocab_size"],
        )

    @property
    def linear_layers(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the linear layers of one decoder layer."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        return [
            (self.hidden, queries),
            (self.hidden, keys),
            (self.hidden, keys),
            (queries, self.hidden),
            (self.hidden, self.feed_forward),
            (self.hidden, self.feed_forward),
            (self.feed_forward, self.hidden),
        ]


@dataclass(frozen=True)
class Work:
    """Amounts of a forward pass."""

    tokens: int = 0  # tokens through the decoder
    pairs: int = 0  # pairs (query, key) of the attention
    targets: int = 0  # positions projected to the vocabulary

    def __add__(self, other: "Work") -> "Work":
        return Work(self.tokens + other.tokens, self.pairs + other.pairs, self.targets + other.targets)

    def times(self, count: int) -> "Work":
        """Return the work of ``count`` such passes."""
        return Work(count * self.tokens, count * self.pairs, count * self.targets)

    def without_targets(self) -> "Work":
        """Return the work of a model without vocabulary projection (reward model, critic)."""
        return Work(self.tokens, self.pairs)


def row_work(length: int, targets: int) -> Work:
    """Return the work of one causal row."""
    return Work(length, length * (length + 1) // 2, targets)


def tree_work(prompt: int, responses: Sequence[int]) -> Work:
    """Return the work of responses that share one prompt, whose tokens are all targets.

    Sampling K responses with a cache has the same amounts as one pass over them, except that the last token of a
    response is never fed back.
    """
    tokens = prompt + sum(responses)
    pairs = prompt * (prompt + 1) // 2 + sum(prompt * length + length * (length + 1) // 2 for length in responses)
    return Work(tokens, pairs, sum(responses))


def forward_flops(shape: Shape, work: Work) -> int:
    """Return the FLOPs of a forward pass."""
    linear = 2 * shape.layers * sum(a * b for a, b in shape.linear_layers)
    attention = 4 * shape.layers * shape.heads * shape.head_size
    projection = 2 * shape.hidden * shape.vocabulary
    return work.tokens * linear + work.pairs * attention + work.targets * projection


def training_flops(shape: Shape, work: Work, lora_rank: int | None = None) -> int:
    """Return the FLOPs of a forward and a backward pass.

    Args:
        shape: Sizes of the model.
        work: Amounts of one forward pass.
        lora_rank: Rank of the adapters on all linear layers of the decoder; None: all weights are trained.
    """
    if lora_rank is None:
        return 3 * forward_flops(shape, work)
    frozen = forward_flops(shape, Work(work.tokens, 0, work.targets))
    attention = forward_flops(shape, Work(0, work.pairs, 0))
    adapters = 2 * shape.layers * sum(lora_rank * (a + b) for a, b in shape.linear_layers) * work.tokens
    return 2 * frozen + 3 * attention + 3 * adapters
