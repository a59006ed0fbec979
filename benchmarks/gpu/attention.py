"""Check of attention without padding (``rlhf.models.varlen``): equal to attention per document, and how much faster."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.outcome import Context, Failed, Figures
from rlhf.models.padding_free import Layout, attend_per_document, lay_out
from rlhf.models.varlen import TOLERANCE, attend_packed, attend_plainly, is_usable

HEADS, GROUPS, WIDTH = 32, 8, 64


def check(context: Context) -> Figures:
    """Compare output and gradients of 16 documents with a shared prompt, then the times."""
    is_gpu = context.device == "cuda"
    longest = 1024 if is_gpu else 48
    dtype = torch.bfloat16 if is_gpu else torch.float32
    layout = make_layout(context.device, longest)
    inputs = [
        torch.randn(1, heads, layout.ids.shape[1], WIDTH, device=context.device, dtype=dtype, requires_grad=True)
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    usable = is_usable(inputs[0], inputs[1], WIDTH**-0.5, None)
    figures: Figures = {"kernel_is_used": usable, "tolerance": TOLERANCE}
    packed = attend_packed if is_gpu else attend_plainly  # the kernel needs a GPU

    results = {}
    for name, attention in (
        ("per_document", partial(padded, layout)),
        ("varlen", partial(packed, packing=layout.packing, scale=WIDTH**-0.5, window=None)),
    ):
        output = attention(*inputs)
        pull = torch.ones_like(output)
        results[name] = [output, *torch.autograd.grad(output, inputs, pull)]
        step = partial(backward, attention, inputs, pull)
        figures[f"{name}_ms"] = milliseconds(step, context.device, 10)
    worst = max(
        ((one - other).abs().max() / other.abs().max()).item()
        for one, other in zip(results["varlen"], results["per_document"], strict=True)
    )
    figures["difference_of_largest_value"] = worst
    if not worst <= TOLERANCE:
        raise Failed("output or gradients differ", figures)
    if is_gpu and not usable:
        raise Failed("the kernel is not used on this device", figures)
    return figures


def make_layout(device: str, longest: int) -> Layout:
    """Return the layout of 4 prompts with 4 responses each, of up to ``longest`` tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest // 2, longest + 1, (16,), generator=generator)
    ids = torch.randint(0, 1000, (16, longest), generator=generator)
    prompt = longest // 4
    ids[:, :prompt] = ids[::4, :prompt].repeat_interleave(4, dim=0)
    order = torch.arange(longest).expand(16, -1)
    return lay_out(ids.to(device), (order < lengths[:, None]).to(device), order.to(device))


def padded(layout: Layout, *states: Tensor) -> Tensor:
    """Return attention with documents padded to the longest."""
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = HEADS // GROUPS, True  # type: ignore[assignment]
    query, key, value = states
    return attend_per_document(module, query, key, value, layout, scaling=WIDTH**-0.5, dropout=0.0)


def backward(attention: Callable[..., Tensor], inputs: list[Tensor], pull: Tensor) -> None:
    """Compute attention and the gradients of its inputs."""
    torch.autograd.grad(attention(*inputs), inputs, pull)


def milliseconds(work: Callable[[], object], device: str, repeats: int) -> float:
    """Return the median time of a call, after three calls that are not measured."""
    times = []
    for index in range(repeats + 3):
        begin = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        if index >= 3:
            times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times)
