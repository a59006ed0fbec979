"""Chunked log-probabilities of given tokens. Shapes: N rows, D hidden, V vocabulary.

Most of the memory of a language model's loss is at the vocabulary: [batch, length, V] logits and their gradient are
much larger than everything else. Here logits are computed in blocks; those of a block are dropped after its forward and
recomputed in its backward, so logits never exist for every position at once. The results equal those of plain
`log_softmax` on all rows, in fp32.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from rlhf.functional.linear_logprobs import Blocks, linear_logprobs


def token_logprobs(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    temperature: float = 1.0,
    chunk_elements: int | None = None,
    entropy: bool = False,
    uniform: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the log-probability [N] of each target under `softmax(head(hidden) / temperature)`.

    Args:
        hidden: Hidden states of the scored positions only, selected by the caller, [N, D].
        targets: Token ids, [N] long.
        head: Maps [n, D] to logits [n, V]; a plain `nn.Linear` takes a faster path with the same results. Its method
            `computed_weight()`, if it has one, returns the weight in the format of autocast.
        temperature: Divides the logits.
        chunk_elements: Bound on the logits per block; None: ``Blocks.choose``.
        entropy: Whether to compute the entropy as well.
        uniform: Whether all log-probabilities will get the same gradient, as in a mean. It is then computed in the
            forward pass, by three multiplications with the output matrix instead of four (as in Liger Kernel, arXiv
            2410.10989). Other gradients stay right. A head that is not plain, or an entropy, ignores it.

    Returns:
        Log-probabilities [N] and entropies [N] (None unless `entropy`), fp32, differentiable once in `hidden` and in
        the parameters of the head.

    Raises:
        ValueError: For a temperature that is not positive, or for inconsistent shapes.
    """
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(f"hidden must be [N, D] and targets [N]: {tuple(hidden.shape)}, {tuple(targets.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive: {temperature}")
    rows = hidden.shape[0]
    if rows == 0:
        empty = hidden.sum(-1).float()  # keeps the graph, so that backward works on a batch without targets
        return empty, empty if entropy else None
    linear = head if isinstance(head, nn.Linear) and _is_plain(head) else None
    if linear is not None:
        return _linear(hidden, targets, linear, temperature, chunk_elements, entropy, uniform)
    chunk_rows = Blocks.choose(rows, _vocabulary(hidden, head), hidden.device.type, chunk_elements).chunk_rows

    def of_chunk(chunk: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = head(chunk).float() / temperature
        return _of_logits(logits, target, entropy)

    pieces = []
    for start in range(0, rows, chunk_rows):
        chunk, target = hidden[start : start + chunk_rows], targets[start : start + chunk_rows]
        if torch.is_grad_enabled():
            piece = checkpoint(
                of_chunk, chunk, target, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
            )
        else:
            piece = of_chunk(chunk, target)
        pieces.append(piece)
    logps = torch.cat([logp for logp, _ in pieces])
    return logps, torch.cat([ent for _, ent in pieces]) if entropy else None


def _of_logits(logits: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Return log-probabilities and entropies [n] of fp32 logits [n, V]."""
    log_normaliser = logits.logsumexp(-1)
    logps = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - log_normaliser
    if not entropy:
        return logps, None
    probabilities = torch.exp(logits - log_normaliser.unsqueeze(-1))
    # -inf logits (forbidden tokens) have probability 0; without the fill, 0 * inf would give nan
    expected = (probabilities * logits.masked_fill(probabilities == 0, 0.0)).sum(-1)
    return logps, log_normaliser - expected


def _vocabulary(hidden: Tensor, head: Callable[[Tensor], Tensor]) -> int:
    with torch.no_grad():
        return int(head(hidden[:1].detach()).shape[-1])


def _is_plain(head: nn.Linear) -> bool:
    """Return whether calling ``head`` is exactly ``x @ weight.T + bias``: no other subclass, no hooks, not sharded."""
    return (
        (type(head) is nn.Linear or hasattr(type(head), "computed_weight"))
        and type(head.weight) in (nn.Parameter, Tensor, FakeTensor)
        and head.weight.is_floating_point()
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks)
    )


def _linear(
    hidden: Tensor,
    targets: Tensor,
    head: nn.Linear,
    temperature: float,
    chunk_elements: int | None,
    entropy: bool,
    uniform: bool,
) -> tuple[Tensor, Tensor | None]:
    device = hidden.device.type
    weight: Tensor = head.computed_weight() if hasattr(head, "computed_weight") else head.weight  # type: ignore[operator]
    bias: Tensor | None = head.bias
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    blocks = Blocks.choose(len(hidden), len(weight), device, chunk_elements)
    with torch.autocast(device, enabled=False):
        return linear_logprobs(hidden, targets, weight, bias, temperature, blocks, entropy, uniform)
