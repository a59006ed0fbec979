"""Attention of documents of different lengths in one kernel without padding: FlashAttention 2 (Dao 2023).

On a GPU in 16 bits it takes the place of attention per document, which pads the documents of a batch to the longest. A
token that a document shares with the one before it is a key of both, and a query of the first alone.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

HALF = (torch.float16, torch.bfloat16)
MOST_WIDTH = 256  # largest head that the kernel computes
TOLERANCE = 2e-2  # of the largest value: bf16 has 8 bits
# From torch 2.12 on, fewer heads of keys than of queries have to be announced.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


@dataclass(frozen=True)
class Packing:
    """Queries and keys of M documents, one after the other; those that own no token are left out."""

    keys: Tensor  # [K] long, index into the N distinct tokens: all tokens of each document
    query_starts: Tensor  # [M + 1] int32, first query of each document, and N
    key_starts: Tensor  # [M + 1] int32, first key of each document, and K
    longest: int  # most keys of a document


def pack(documents: Tensor, lengths: Tensor, shared: Tensor) -> Packing:
    """Return the packing of documents.

    Args:
        documents: Index of each document's tokens, [M, L] long, as in ``Layout``.
        lengths: Tokens of each document, [M] long.
        shared: Leading tokens that belong to the document before, [M] long.
    """
    own = lengths - shared
    has_own = own > 0
    documents, lengths, own = documents[has_own], lengths[has_own], own[has_own]
    is_token = torch.arange(documents.shape[1], device=documents.device) < lengths[:, None]
    query_starts, key_starts = (F.pad(count.cumsum(0), (1, 0)).int() for count in (own, lengths))
    return Packing(documents[is_token], query_starts, key_starts, documents.shape[1])


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scale: float | None,
    window: int | None,
    kernel: Callable[..., Any] = varlen_attn,
) -> Tensor:
    """Compute causal attention of each document, [1, N, H, d].

    The queries of a document are its last tokens; the kernel aligns the mask with the last key.

    Args:
        query: [1, H, N, d].
        key: [1, G, N, d], H a multiple of G.
        value: As ``key``.
        packing: Of the N distinct tokens.
        scale: Factor on the scores; None: 1 / sqrt(d).
        window: Tokens that one attends to, itself included; None: all before.
        kernel: Kernel with the signature of ``varlen_attn``.
    """
    dtype = compute_dtype(query)
    queries = query[0].transpose(0, 1).to(dtype)
    keys, values = (
        F.embedding(packing.keys, part[0].transpose(0, 1).flatten(1)).view(-1, part.shape[1], part.shape[3]).to(dtype)
        for part in (key, value)
    )
    output: Tensor = kernel(
        queries.contiguous(),
        keys,
        values,
        packing.query_starts,
        packing.key_starts,
        packing.longest,
        packing.longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **_GROUPED,
    )
    return output[None]


def compute_dtype(query: Tensor) -> torch.dtype:
    """Return the format that attention computes in: that of autocast, or else that of the queries."""
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


def is_usable(query: Tensor, key: Tensor, scale: float | None, window: int | None) -> bool:
    """Return whether the kernel computes attention of these queries and keys, and computes it right.

    The first batch of each kind is preceded by a small one, in which output and gradients are compared with those of
    plain attention.
    """
    if query.device.type != "cuda" or query.shape[-1] > MOST_WIDTH or query.shape[-1] % 8:
        return False
    dtype = compute_dtype(query)
    kind = Kind(query.device, dtype, query.shape[1], key.shape[1], query.shape[-1], scale, window)
    return dtype in HALF and _agrees(kind)


class Kind(NamedTuple):
    """Properties of the inputs, beside their values, that a kernel's result may depend on."""

    device: torch.device
    dtype: torch.dtype
    heads: int  # of queries
    groups: int  # heads of keys
    width: int  # of a head
    scale: float | None  # factor on the scores
    window: int | None  # tokens that one attends to


@cache
def _agrees(kind: Kind) -> bool:
    """Return whether output and gradients of a small batch with a shared prompt are those of plain attention."""
    with torch.autocast(kind.device.type, enabled=False), torch.enable_grad():
        try:
            found = example(kind, attend_packed)
        except (RuntimeError, ValueError):  # a build without the kernel, or a device that it does not run on
            return False
        expected = example(kind._replace(dtype=torch.float32), attend_plainly)
    pairs = zip(found, expected, strict=True)
    return all(bool((one.float() - other).abs().max() <= TOLERANCE * other.abs().max()) for one, other in pairs)


def example(kind: Kind, attention: Callable[..., Tensor]) -> list[Tensor]:
    """Return the output of two documents of 5 and 4 tokens, of which they share 2, and the gradients of its inputs."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        return torch.randn(1, count, 7, kind.width, generator=generator).to(kind.device, kind.dtype)

    device = kind.device
    inputs = [draw(count).requires_grad_() for count in (kind.heads, kind.groups, kind.groups)]
    documents = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 5, 6, 0]], device=device)
    packing = pack(documents, torch.tensor([5, 4], device=device), torch.tensor([0, 2], device=device))
    output = attention(*inputs, packing, kind.scale, kind.window)
    pull = draw(kind.heads).transpose(1, 2)
    return [output.detach(), *torch.autograd.grad(output, inputs, pull)]


def attend_plainly(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float | None, window: int | None
) -> Tensor:
    """Compute what ``attend_packed`` does by a softmax for each document."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (part[0].repeat_interleave(repeats, dim=0) for part in (key, value))
    outputs = []
    starts = zip(packing.query_starts.tolist(), packing.key_starts.tolist(), strict=True)
    for (first, first_key), (last, last_key) in pairwise(starts):
        keys = packing.keys[first_key:last_key]
        queries, count = query[0][:, first:last], last_key - first_key
        scores = queries @ key[:, keys].transpose(1, 2) * (scale or query.shape[-1] ** -0.5)
        column = torch.arange(count, device=query.device)
        distance = column[count - (last - first) :, None] - column
        seen = (distance >= 0) & (distance < (window or count))
        outputs.append(scores.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ value[:, keys])
    return torch.cat(outputs, dim=1).transpose(0, 1)[None]
