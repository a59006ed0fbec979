"""Causal attention of documents of different lengths on a CPU: products of blocks of one document, without padding.

torch's fused kernel takes documents of one length, so that the documents of a batch are padded to the longest, and it
computes a token that a document shares with the one before it once more as a query. Here a block of queries of one
document meets the keys up to its last query. A shared token is a key of both documents, and a query of the first alone.
The scores of a block fit the processor's cache; the backward pass computes them again (FlashAttention 2, Dao 2023).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 64  # queries per block
LEAST_BLOCK = 16  # the same, however long the document is
SCORES = 2**20  # most scores of a block, 4 MiB in fp32
OVERHEAD = 20_000  # scores that torch's kernel computes in the time that a block takes beside its products (measured)


@dataclass(frozen=True)
class Document:
    """Tokens of a document in a row of N distinct tokens; those that it owns are its last ones, and contiguous."""

    first: int  # index of its first own token
    own: int  # number of own tokens
    keys: Tensor | slice  # indices of all its tokens, [K] long
    length: int  # K


def list_documents(documents: Tensor, lengths: Tensor, shared: Tensor) -> list[Document]:
    """Return the documents of a layout that own tokens.

    Args:
        documents: Index of each document's tokens, [M, L] long, as in ``Layout``.
        lengths: Tokens of each document, [M] long.
        shared: Leading tokens that belong to a document before, [M] long.
    """
    found, first = [], 0
    for row, length, taken in zip(documents, lengths.tolist(), shared.tolist(), strict=True):
        own = length - taken
        if own:
            found.append(Document(first, own, row[:length] if taken else slice(first, first + length), length))
        first += own
    return found


def is_supported(query: Tensor) -> bool:
    """Return whether attention of these queries can be computed in blocks: on a CPU, in fp32 or fp64."""
    is_exact = query.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    return query.device.type == "cpu" and is_exact


def is_faster(heads: int, count: int, documents: Sequence[Document]) -> bool:
    """Return whether blocks save more scores than they cost.

    Args:
        heads: Heads of queries.
        count: Number of documents that are padded to the longest otherwise.
        documents: Those that own tokens.
    """
    longest = max(document.length for document in documents)
    scores = sum(document.own * (document.length - document.own / 2) for document in documents)
    passes = sum(-(-document.own // BLOCK) for document in documents)
    return heads * scores + OVERHEAD * passes < heads * count * longest**2 / 2


def attend_blocked(
    query: Tensor, key: Tensor, value: Tensor, documents: Sequence[Document], scale: float | None, window: int | None
) -> Tensor:
    """Compute causal attention of each document, [1, N, H, d].

    Args:
        query: [1, H, N, d].
        key: [1, G, N, d], H a multiple of G.
        value: As ``key``.
        documents: Those of the N distinct tokens.
        scale: Factor on the scores; None: 1 / sqrt(d).
        window: Tokens that one attends to, itself included; None: all before.
    """
    rows = (part[0].transpose(0, 1) for part in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output: Tensor = _Attention.apply(*rows, documents, scale, window)
    return output[None]


class _Attention(torch.autograd.Function):
    """Attention of rows [N, H, d] with an explicit backward, which computes the probabilities again."""

    @staticmethod
    def forward(ctx, query, key, value, documents, scale, window):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(query, key, value)
        ctx.arguments = documents, scale, window
        output = torch.empty(query.shape, dtype=query.dtype)
        for document in documents:
            keys, values = (_take(part, document.keys) for part in (key, value))
            for block in _blocks(document, query.shape[1], key.shape[1], window):
                probabilities = block.probabilities(block.queries(query) * scale, keys[:, block.seen])
                block.store(output, torch.bmm(probabilities, values[:, block.seen]))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, by_output):  # type: ignore[no-untyped-def]
        query, key, value = ctx.saved_tensors
        documents, scale, window = ctx.arguments
        by_query = torch.empty(query.shape, dtype=query.dtype)
        by_key, by_value = (torch.zeros(part.shape, dtype=part.dtype) for part in (key, value))
        for document in documents:
            keys, values = (_take(part, document.keys) for part in (key, value))
            by_keys, by_values = torch.zeros_like(keys), torch.zeros_like(values)
            for block in _blocks(document, query.shape[1], key.shape[1], window):
                queries, pull, seen = block.queries(query) * scale, block.queries(by_output), keys[:, block.seen]
                probabilities = block.probabilities(queries, seen)
                by_values[:, block.seen].baddbmm_(probabilities.transpose(1, 2), pull)
                by_scores = torch.bmm(pull, values[:, block.seen].transpose(1, 2))
                by_scores = torch._softmax_backward_data(by_scores, probabilities, -1, probabilities.dtype)
                block.store(by_query, torch.bmm(by_scores, seen).mul_(scale))
                by_keys[:, block.seen].baddbmm_(by_scores.transpose(1, 2), queries)
            for total, part in ((by_key, by_keys), (by_value, by_values)):
                if isinstance(document.keys, slice):
                    total[document.keys] += part.transpose(0, 1)
                else:
                    total.index_add_(0, document.keys, part.transpose(0, 1))
        return by_query, by_key, by_value, None, None, None


@dataclass(frozen=True)
class _Block:
    """Queries of a document, and the keys that they see. G heads of keys, each with R heads of queries."""

    rows: slice  # of the q queries, among the N tokens
    before: int  # position of the first query among the keys that are seen
    seen: slice  # positions in the document of the k keys
    groups: int  # G
    repeats: int  # R
    window: int | None

    def queries(self, states: Tensor) -> Tensor:
        """Return the block's rows of states [N, H, d] as [G, R * q, d]."""
        rows = states[self.rows]
        if self.repeats == 1:
            return rows.transpose(0, 1)
        return rows.unflatten(1, (self.groups, self.repeats)).permute(1, 2, 0, 3).flatten(1, 2)

    def store(self, states: Tensor, values: Tensor) -> None:
        """Set the block's rows of states [N, H, d] to values [G, R * q, d]."""
        by_head = values.reshape(self.groups * self.repeats, -1, values.shape[-1])
        states[self.rows].copy_(by_head.transpose(0, 1))

    def probabilities(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return the probabilities [G, R * q, k] of scaled queries [G, R * q, d] on the seen keys [G, k, d]."""
        scores = torch.bmm(queries, keys.transpose(1, 2))
        count = self.rows.stop - self.rows.start
        heads = scores.view(-1, count, scores.shape[2])
        if self.window is None or self.seen.stop - self.seen.start <= self.window:
            heads[..., self.before :] += _future(count, scores.dtype)
        else:
            distance = torch.arange(self.before, self.before + count)[:, None] - torch.arange(scores.shape[2])
            heads.masked_fill_((distance < 0) | (distance >= self.window), -torch.inf)
        return torch.softmax(scores, -1, out=scores)


def _blocks(document: Document, heads: int, groups: int, window: int | None) -> Iterator[_Block]:
    """Yield the blocks of queries that a document owns."""
    size = max(LEAST_BLOCK, min(BLOCK, SCORES // (heads * document.length)))
    taken = document.length - document.own
    for start in range(0, document.own, size):
        end = min(start + size, document.own)
        oldest = 0 if window is None else max(0, taken + start + 1 - window)
        rows, seen = slice(document.first + start, document.first + end), slice(oldest, taken + end)
        yield _Block(rows, taken + start - oldest, seen, groups, heads // groups, window)


@cache
def _future(count: int, dtype: torch.dtype) -> Tensor:
    """Return 0 on and before the diagonal of a square, -inf after it; adding it is faster than a fill under a mask."""
    return torch.full((count, count), -torch.inf, dtype=dtype).triu_(1)


def _take(states: Tensor, index: Tensor | slice) -> Tensor:
    """Return rows of states [N, G, d] as [G, K, d]."""
    rows = states[index] if isinstance(index, slice) else states.index_select(0, index)
    return rows.transpose(0, 1)
