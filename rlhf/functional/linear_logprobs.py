"""Log-probabilities under a linear output layer, as an autograd function. Shapes: N rows, D hidden, V vocabulary.

Logits are computed in blocks of n rows and v columns that fit the processor's cache: a block is read several times (by
the softmax and by two products), and reading it from main memory would take longer than the products. A block costs one
softmax and no further exponentials: the softmax of its columns is multiplied by exp(their log-normaliser - that of the
row). The gradient of a row is multiplied into its hidden state [D], not into its probabilities [V].
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = 2**21  # logits per block: 8 MiB in fp32, which fits the last cache of a CPU
GPU_BLOCK_ELEMENTS = 2**25  # on a GPU, where small blocks would take too little work per kernel: 128 MiB
MOST_BLOCK_ROWS = 2048  # with more, a block would have too few columns to be multiplied at the full rate
CHUNK_ELEMENTS = 2**19  # logits per block of a chunk, and per chunk if the vocabulary is small
MIN_CHUNK_ROWS = 256  # with a large vocabulary, fewer rows would read the whole output matrix for too little work
LEAST = -1e30  # replaces a logit of -inf (a forbidden token), because 0 * inf would give nan


@dataclass(frozen=True)
class Blocks:
    """Sizes of the blocks that [N, V] logits are computed in."""

    rows: int
    columns: int
    chunk_rows: int  # rows of a chunk, all of whose blocks exist at once
    chunk_columns: int  # columns of a block of a chunk

    @classmethod
    def choose(cls, rows: int, vocabulary: int, device: str, most: int | None = None) -> "Blocks":
        """Return the sizes for N rows and V columns.

        Args:
            rows: N.
            vocabulary: V.
            device: Type of the device.
            most: Bound on the logits of a block and of a chunk; None: a default for the device.
        """
        if most is None:
            bound, of_chunk = (BLOCK_ELEMENTS, CHUNK_ELEMENTS) if device == "cpu" else (GPU_BLOCK_ELEMENTS,) * 2
            chunk_rows = max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // vocabulary)
        else:
            bound, of_chunk, chunk_rows = most, most, max(1, most // vocabulary)
        height = max(1, min(rows, bound, max(MOST_BLOCK_ROWS, bound // vocabulary)))
        columns, chunk_columns = (
            max(1, min(vocabulary, most_logits // count))
            for most_logits, count in ((bound, height), (of_chunk, chunk_rows))
        )
        return cls(height, columns, chunk_rows, chunk_columns)


def linear_logprobs(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    blocks: Blocks,
    entropy: bool,
    uniform: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return what ``token_logprobs`` does for ``logits = hidden @ weight.T + bias``, computed in the weights' dtype.

    Args:
        hidden: [N, D].
        targets: [N] long.
        weight: [V, D].
        bias: [V] or None.
        temperature: Divides the logits.
        blocks: Sizes of the blocks.
        entropy: Whether to compute the entropy as well.
        uniform: Whether all log-probabilities will get the same gradient.
    """
    found: tuple[Tensor, Tensor | None] = _LinearLogprobs.apply(
        hidden, weight, bias, targets, temperature, blocks, entropy, uniform and torch.is_grad_enabled()
    )
    return found


@dataclass(frozen=True)
class Layer:
    """Output layer with a temperature."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    temperature: float

    def logits(self, hidden: Tensor, columns: slice) -> Tensor:
        """Return the fp32 logits [n, v] of hidden states [n, D], divided by the temperature."""
        bias = None if self.bias is None else self.bias[columns]
        logits = F.linear(hidden, self.weight[columns], bias).float()
        if self.temperature != 1.0:
            logits /= self.temperature
        return logits if bias is None else logits.clamp_(min=LEAST)


@dataclass(frozen=True)
class Gradients:
    """Sums of the gradients of hidden states and head, in fp32; None where none is wanted."""

    hidden: Tensor | None = None  # [N, D]
    weight: Tensor | None = None  # [V, D]
    bias: Tensor | None = None  # [V]

    @classmethod
    def zeros(cls, wanted: Sequence[bool], *tensors: Tensor | None) -> "Gradients":
        """Return zeros for those of hidden states, weight and bias that are wanted."""
        return cls(
            *(
                torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)
                if is_wanted and tensor is not None
                else None
                for is_wanted, tensor in zip(wanted, tensors, strict=True)
            )
        )

    def add_rows(
        self,
        layer: Layer,
        hidden: Tensor,
        rows: slice,
        pull: Tensor | None,
        parts: Iterable[tuple[slice, Tensor]],
    ) -> None:
        """Add the gradients of n rows.

        Args:
            layer: Output layer.
            hidden: Their hidden states, [n, D].
            rows: Their indices.
            pull: Factor of each row, [n, 1]; None: 1.
            parts: Columns and ``g`` [n, v], where the gradient of the scaled logits is ``-pull * g``.
        """
        factor = torch.full((len(hidden), 1), -1 / layer.temperature, device=hidden.device)
        if pull is not None:
            factor *= pull
        scaled = (hidden * factor).to(hidden.dtype)
        by_hidden = None if self.hidden is None else self.hidden[rows]
        for columns, part in parts:
            if self.bias is not None:
                self.bias[columns] += (part.t() @ factor).squeeze(-1)
            part = part.to(layer.weight.dtype)
            if by_hidden is not None:
                _add_product(by_hidden, part, layer.weight[columns])
            if self.weight is not None:
                _add_product(self.weight[columns], part.t(), scaled)
        if by_hidden is not None:
            by_hidden *= factor


class _LinearLogprobs(torch.autograd.Function):
    """Autograd function with an explicit backward.

    d logp / d logits = onehot - p, d entropy / d logits = -p * (log p + entropy). If only `hidden` needs a gradient (a
    frozen head, as with LoRA) and no entropy is computed, d logp / d hidden [N, D] is saved in the forward, and the
    backward needs no projection. With `uniform` the same holds for the head: the gradients of the sum of all logps are
    saved, and multiplied in the backward. For both, the forward has to know a row's normaliser before it multiplies by
    the row's probabilities, so it keeps all blocks of a chunk of rows until they are multiplied.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, blocks, entropy, uniform):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.blocks = temperature, blocks
        wanted = ctx.needs_input_grad[:3]
        ctx.head_frozen = not (wanted[1] or wanted[2])
        ctx.early = not entropy and (uniform or ctx.head_frozen) and any(wanted)
        layer = Layer(weight, bias, temperature)
        logps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        normalisers = torch.empty_like(logps)
        entropies = torch.empty_like(logps) if entropy else None
        found = Gradients()
        if ctx.early:
            found = Gradients.zeros(wanted, hidden, weight, bias)
        height, width = (blocks.chunk_rows, blocks.chunk_columns) if ctx.early else (blocks.rows, blocks.columns)
        for rows in _slices(len(hidden), height):
            scored = _score(layer, hidden[rows], targets[rows], width, entropy, keep=ctx.early)
            logps[rows], normalisers[rows] = scored.logps, scored.normalisers
            if entropies is not None and scored.entropies is not None:
                entropies[rows] = scored.entropies
            if ctx.early:
                parts = scored.parts(targets[rows], len(weight))
                found.add_rows(layer, hidden[rows], rows, None, parts)
        kept = (None, None, None, None) if ctx.head_frozen and ctx.early else (hidden, targets, normalisers, entropies)
        ctx.save_for_backward(weight, bias, *kept, found.hidden, found.weight, found.bias)
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, by_logp, by_entropy):  # type: ignore[no-untyped-def]
        nothing = (None,) * 8
        if by_logp is None and by_entropy is None:
            return nothing
        weight, bias, hidden, targets, normalisers, entropies, *early = ctx.saved_tensors
        found = Gradients(*early)
        if ctx.early and (ctx.head_frozen or _is_uniform(by_logp)):
            if found.hidden is not None:
                found = Gradients(by_logp.unsqueeze(-1) * found.hidden, found.weight, found.bias)
            of_head = (None if total is None else total * by_logp[0] for total in (found.weight, found.bias))
            return *_cast((found.hidden, *of_head), weight.dtype), *nothing[3:]
        found = Gradients.zeros(ctx.needs_input_grad[:3], hidden, weight, bias)
        layer = Layer(weight, bias, ctx.temperature)
        pull, by_entropy = (None if given is None else given.unsqueeze(-1) for given in (by_logp, by_entropy))

        def parts(rows: slice) -> Iterator[tuple[slice, Tensor]]:
            """Yield columns and g, for gradients -pull * g or, with an entropy, -g of the scaled logits."""
            normaliser = normalisers[rows].unsqueeze(-1)
            for columns in _slices(len(weight), ctx.blocks.columns):
                logits = layer.logits(hidden[rows], columns)
                if by_entropy is None:
                    block = Block(columns, *_softmax(logits))
                    yield columns, block.gradient(targets[rows], len(weight), normalisers[rows])
                    continue
                place, is_inside = _places(targets[rows], columns, len(weight))
                log_probabilities = logits.sub_(normaliser)
                negated = log_probabilities.exp()  # the probabilities p
                log_probabilities.add_(entropies[rows].unsqueeze(-1)).mul_(by_entropy[rows])
                negated *= log_probabilities if pull is None else log_probabilities.add_(pull[rows])
                yield columns, negated if pull is None else negated.scatter_add_(-1, place, -pull[rows] * is_inside)

        for rows in _slices(len(hidden), ctx.blocks.rows):
            factor = None if pull is None or by_entropy is not None else pull[rows]
            found.add_rows(layer, hidden[rows], rows, factor, parts(rows))
        return *_cast((found.hidden, found.weight, found.bias), weight.dtype), *nothing[3:]


class Block(NamedTuple):
    """Softmax of some columns."""

    columns: slice
    probabilities: Tensor  # [n, v], sums 1 over these columns
    normalisers: Tensor  # [n], log of the sum of exp(logits) over these columns

    def gradient(self, targets: Tensor, vocabulary: int, normalisers: Tensor) -> Tensor:
        """Turn the probabilities into p - onehot [n, v] in place; ``normalisers`` [n] are those of all columns."""
        place, is_inside = _places(targets, self.columns, vocabulary)
        self.probabilities.mul_((self.normalisers - normalisers).exp_().unsqueeze(-1))
        return self.probabilities.scatter_add_(-1, place, -is_inside.to(self.probabilities.dtype))


@dataclass(frozen=True)
class Scored:
    """Results for n rows."""

    logps: Tensor  # [n]
    normalisers: Tensor  # [n]
    entropies: Tensor | None  # [n]
    blocks: list[Block]  # all columns, if they were to be kept

    def parts(self, targets: Tensor, vocabulary: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield columns and p - onehot of each block."""
        for block in self.blocks:
            yield block.columns, block.gradient(targets, vocabulary, self.normalisers)


def _score(layer: Layer, hidden: Tensor, targets: Tensor, width: int, entropy: bool, keep: bool = False) -> Scored:
    """Return the results for hidden states [n, D] and targets [n], computed in blocks of ``width`` columns."""
    chosen = torch.zeros((len(hidden), 1), dtype=torch.float32, device=hidden.device)
    normalisers, expected, blocks = [], [], []
    for columns in _slices(len(layer.weight), width):
        logits = layer.logits(hidden, columns)
        place, is_inside = _places(targets, columns, len(layer.weight))
        chosen = torch.where(is_inside, logits.gather(-1, place), chosen)
        block = Block(columns, *_softmax(logits, in_place=not entropy))
        normalisers.append(block.normalisers)
        if entropy:
            expected.append(block.probabilities.mul_(logits).sum(-1))
        if keep:
            blocks.append(block)
    by_block = torch.stack(normalisers)
    whole = by_block.logsumexp(0)
    entropies = whole - ((by_block - whole).exp_() * torch.stack(expected)).sum(0) if entropy else None
    return Scored(chosen.squeeze(-1) - whole, whole, entropies, blocks)


def _softmax(logits: Tensor, in_place: bool = True) -> tuple[Tensor, Tensor]:
    """Return the softmax [n, v] of logits, and its log-normaliser [n].

    The largest probability is 1 / sum(exp(logits - largest)), so that no pass over exponentials is needed for it.
    """
    largest = logits.amax(-1)
    on_cpu = logits.device.type == "cpu"  # where the kernel may write over its input
    probabilities = torch.softmax(logits, -1, out=logits) if in_place and on_cpu else torch.softmax(logits, -1)
    return probabilities, largest - probabilities.amax(-1).log_()


def _places(targets: Tensor, columns: slice, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return the column in a block of each target, [n, 1] long, and whether it is inside, [n, 1] bool; 0 outside."""
    first, last, _ = columns.indices(vocabulary)
    is_inside = (targets >= first) & (targets < last)
    return torch.where(is_inside, targets - first, 0).unsqueeze(-1), is_inside.unsqueeze(-1)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to an fp32 sum."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, start + size)


def _cast(tensors: Iterable[Tensor | None], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def _is_uniform(gradient: Tensor) -> bool:
    """Return whether all values [N] are equal; those of a plain sum are one value, expanded, and are not read."""
    return gradient.stride() == (0,) or bool((gradient == gradient[0]).all())
