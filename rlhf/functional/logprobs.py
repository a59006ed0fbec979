"""Chunked log-probabilities of given tokens. Shapes: N rows, D hidden, V vocabulary.

Most of the memory of a language model's loss is at the vocabulary: [batch, length, V] logits and their gradient are
much larger than everything else. Here rows pass the output layer in chunks; the logits of a chunk are dropped after its
forward and recomputed in its backward, so logits never exist for every position at once. The results equal those of
plain `log_softmax` on all rows, in fp32.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**19  # logits per chunk: 2 MiB in fp32, which fits into a CPU core's cache
MIN_CHUNK_ROWS = 256  # with a large vocabulary, fewer rows would read the whole output matrix for too little work


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
        chunk_elements: Bound on n * V per chunk; the default is 2**19 (and at least 256 rows).
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
    vocabulary = linear.out_features if linear is not None else _vocabulary(hidden, head)
    if chunk_elements is None:
        chunk_rows = max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // vocabulary)
    else:
        chunk_rows = max(1, chunk_elements // vocabulary)
    if linear is not None:
        return _linear(hidden, targets, linear, temperature, chunk_rows, entropy, uniform)

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
    chunk_rows: int,
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
    with torch.autocast(device, enabled=False):
        logps, entropies = _LinearLogprobs.apply(
            hidden, weight, bias, targets, temperature, chunk_rows, entropy, uniform and torch.is_grad_enabled()
        )
    return logps, entropies


class _LinearLogprobs(torch.autograd.Function):
    """Autograd function for `logits = hidden @ weight.T + bias` with an explicit backward.

    d logp / d logits = onehot - p, d entropy / d logits = -p * (log p + entropy). If only `hidden` needs a gradient (a
    frozen head, as with LoRA) and no entropy is computed, d logp / d hidden [N, D] is saved in the forward, and the
    backward needs no projection. With `uniform` the same holds for the head: the gradients of the sum of all logps are
    saved, and multiplied in the backward.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, chunk_rows, entropy, uniform):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.chunk_rows = temperature, chunk_rows
        rows = hidden.shape[0]
        logps = torch.empty(rows, dtype=torch.float32, device=hidden.device)
        normalisers = torch.empty_like(logps)
        entropies = torch.empty_like(logps) if entropy else None
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        ctx.head_frozen = not (wants_weight or wants_bias)
        early = not entropy and (uniform or ctx.head_frozen) and any(ctx.needs_input_grad[:3])
        jacobian = torch.empty_like(hidden) if early and wants_hidden else None
        by_weight = _zeros(weight) if early and wants_weight else None
        by_bias = _zeros(bias) if early and wants_bias else None
        for start in range(0, rows, chunk_rows):
            piece = slice(start, start + chunk_rows)
            logits = _LinearLogprobs.logits(hidden[piece], weight, bias, temperature)
            target = targets[piece].unsqueeze(-1)
            normaliser = logits.logsumexp(-1, keepdim=True)
            logps[piece] = (logits.gather(-1, target) - normaliser).squeeze(-1)
            normalisers[piece] = normaliser.squeeze(-1)
            if entropies is not None:
                probabilities = torch.exp(logits - normaliser)
                expected = (probabilities * logits.masked_fill_(probabilities == 0, 0.0)).sum(-1)
                entropies[piece] = normaliser.squeeze(-1) - expected
            if early:
                by_logits = logits.sub_(normaliser).exp_().neg_()
                by_logits.scatter_add_(-1, target, torch.ones_like(normaliser))
                _LinearLogprobs.accumulate(by_logits, hidden, weight, temperature, piece, jacobian, by_weight, by_bias)
        ctx.early = early
        kept = (None, None, None, None) if ctx.head_frozen and early else (hidden, targets, normalisers, entropies)
        ctx.save_for_backward(weight, bias, *kept, jacobian, by_weight, by_bias)
        return logps, entropies

    @staticmethod
    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
        """Return fp32 logits [n, V] of hidden states [n, D], divided by the temperature."""
        logits = nn.functional.linear(hidden, weight, bias).float()
        return logits if temperature == 1.0 else logits / temperature

    @staticmethod
    def accumulate(by_logits, hidden, weight, temperature, piece, by_hidden, by_weight, by_bias):  # type: ignore[no-untyped-def]
        """Set or add a chunk's part of the gradients that are wanted (not None), from that of its scaled logits [n, V].

        ``by_logits`` is changed.
        """
        if temperature != 1.0:
            by_logits /= temperature
        if by_bias is not None:
            by_bias += by_logits.sum(0)
        by_logits = by_logits.to(weight.dtype)
        if by_hidden is not None:
            by_hidden[piece] = by_logits @ weight
        if by_weight is not None:
            by_weight += by_logits.t() @ hidden[piece]

    @staticmethod
    @once_differentiable
    def backward(ctx, by_logp, by_entropy):  # type: ignore[no-untyped-def]
        nothing = (None,) * 8
        if by_logp is None and by_entropy is None:
            return nothing
        weight, bias, hidden, targets, normalisers, entropies, jacobian, *of_head = ctx.saved_tensors
        if ctx.early and (ctx.head_frozen or _is_uniform(by_logp)):
            by_hidden = None if jacobian is None else (by_logp.unsqueeze(-1) * jacobian).to(jacobian.dtype)
            scaled = [
                None if total is None else (total * by_logp[0]).to(parameter.dtype)
                for total, parameter in zip(of_head, (weight, bias), strict=True)
            ]
            return by_hidden, *scaled, *nothing[3:]
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        by_hidden = torch.empty_like(hidden) if wants_hidden else None
        by_weight = _zeros(weight) if wants_weight else None
        by_bias = _zeros(bias) if wants_bias else None
        for start in range(0, hidden.shape[0], ctx.chunk_rows):
            piece = slice(start, start + ctx.chunk_rows)
            logits = _LinearLogprobs.logits(hidden[piece], weight, bias, ctx.temperature)
            log_probabilities = logits.sub_(normalisers[piece].unsqueeze(-1))
            by_logits = log_probabilities.exp()  # the probabilities p
            pull = torch.zeros_like(normalisers[piece]) if by_logp is None else by_logp[piece]
            if by_entropy is None:
                by_logits *= -pull.unsqueeze(-1)
            else:
                finite = log_probabilities.masked_fill(by_logits == 0, 0.0)
                finite += entropies[piece].unsqueeze(-1)
                by_logits *= -(finite * by_entropy[piece].unsqueeze(-1) + pull.unsqueeze(-1))
            by_logits.scatter_add_(-1, targets[piece].unsqueeze(-1), pull.unsqueeze(-1))
            _LinearLogprobs.accumulate(by_logits, hidden, weight, ctx.temperature, piece, by_hidden, by_weight, by_bias)
        return (
            by_hidden,
            None if by_weight is None else by_weight.to(weight.dtype),
            None if by_bias is None else by_bias.to(bias.dtype),
            *nothing[3:],
        )


def _zeros(parameter: Tensor) -> Tensor:
    """Return an fp32 sum over chunks, whatever the dtype of the weights."""
    return torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)


def _is_uniform(gradient: Tensor) -> bool:
    """Return whether all values [N] are equal; those of a plain sum are one value, expanded, and are not read."""
    return gradient.stride() == (0,) or bool((gradient == gradient[0]).all())
