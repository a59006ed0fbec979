"""Attention without padding: packing of queries and keys, against attention per document."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.models import varlen
from rlhf.models.padding_free import Layout, attend_per_document, lay_out
from rlhf.models.varlen import attend_packed, attend_plainly, is_usable, pack

HEADS, GROUPS, WIDTH = 4, 2, 8
ROWS = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 20], [5, 6, 7, 20], [1, 2], [50]]  # the third is the second again


def layout() -> Layout:
    longest = max(map(len, ROWS))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in ROWS])
    order = torch.arange(longest).expand(len(ROWS), -1)
    return lay_out(ids, order < torch.tensor([[len(row)] for row in ROWS]), order)


def states(count: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, count, WIDTH, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS)]


def test_shared_tokens_are_keys_of_both_documents_and_queries_of_the_first() -> None:
    packing = layout().packing
    assert packing.query_starts.tolist() == [0, 6, 7, 9, 10]  # 6 distinct tokens, 1, (none), 2, 1
    assert packing.key_starts.tolist() == [0, 6, 10, 12, 13]
    assert packing.keys.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 6, 7, 8, 9]
    assert packing.query_starts.dtype == packing.key_starts.dtype == torch.int32


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("attention", ["plain", "kernel"])
def test_output_and_gradients_are_those_of_attention_per_document(window: int | None, attention: str) -> None:
    made = layout()
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = HEADS // GROUPS, True  # type: ignore[assignment]
    inputs = states(made.ids.shape[1])
    expected = attend_per_document(module, *inputs, made, scaling=0.3, dropout=0.0, sliding_window=window)
    if attention == "plain":
        found = attend_plainly(*inputs, made.packing, 0.3, window)
    else:
        found = attend_packed(*inputs, made.packing, 0.3, window, kernel=bottom_right)
    pull = torch.randn_like(expected)
    for one, other in zip(
        [found, *torch.autograd.grad(found, inputs, pull)],
        [expected, *torch.autograd.grad(expected, inputs, pull)],
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def bottom_right(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor, *_: int, **options: Any
) -> Tensor:
    """Compute ``varlen_attn`` by PyTorch's own mask of the lower right corner, document by document."""
    past, ahead = options["window_size"]
    assert ahead == 0
    outputs = []
    for index in range(len(starts) - 1):
        queries = query[starts[index] : starts[index + 1]].transpose(0, 1)
        keys, values = (x[key_starts[index] : key_starts[index + 1]].transpose(0, 1) for x in (key, value))
        mask = torch.ones(queries.shape[1], keys.shape[1], dtype=torch.bool).tril(keys.shape[1] - queries.shape[1])
        if past >= 0:
            mask &= ~torch.ones_like(mask).tril(keys.shape[1] - queries.shape[1] - past - 1)
        outputs.append(
            nn.functional.scaled_dot_product_attention(
                queries[None], keys[None], values[None], attn_mask=mask, scale=options["scale"], enable_gqa=True
            )[0].transpose(0, 1)
        )
    return torch.cat(outputs)


def test_the_kernel_computes_in_the_format_of_autocast() -> None:
    """Under autocast queries and keys are fp32 and values bf16, as rotary positions are computed in fp32."""
    seen: list[torch.dtype] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.extend((query.dtype, key.dtype, value.dtype))
        return query

    made = layout()
    query, key, value = states(made.ids.shape[1])
    with torch.autocast("cpu", torch.bfloat16):
        attend_packed(query, key, value.bfloat16(), made.packing, None, None, kernel=kernel)
    assert seen == [torch.bfloat16] * 3


def test_a_cpu_keeps_attention_per_document() -> None:
    query, key, _ = states(4)
    assert not is_usable(query.bfloat16(), key.bfloat16(), None, None)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_of_a_gpu_passes_its_self_check(dtype: torch.dtype, window: int | None) -> None:
    query, key, _ = (state.to("cuda", dtype) for state in states(4))
    assert is_usable(query, key, None, window)


def test_a_kernel_that_is_absent_is_not_used() -> None:
    """A CPU has none: the self-check finds it."""
    assert not varlen._agrees(varlen.Kind(torch.device("cpu"), torch.bfloat16, HEADS, GROUPS, WIDTH, None, None))


def test_the_example_of_the_self_check_sees_a_mask_aligned_with_the_first_key() -> None:
    """The error that another kernel could make."""

    def top_left(*inputs: Any) -> Tensor:
        query, key, value, packing, scale, window = inputs
        keys = packing.keys[packing.key_starts[1] : packing.key_starts[2]].flip(0)
        changed = pack(torch.stack([torch.arange(5), torch.cat([keys, keys.new_zeros(1)])]), *LENGTHS)
        return attend_plainly(query, key, value, changed, scale, window)

    kind = varlen.Kind(torch.device("cpu"), torch.float32, HEADS, GROUPS, WIDTH, None, None)
    right, wrong = varlen.example(kind, attend_plainly), varlen.example(kind, top_left)
    assert (right[0] - wrong[0]).abs().max() > varlen.TOLERANCE * right[0].abs().max()


LENGTHS = (torch.tensor([5, 4]), torch.tensor([0, 2]))
