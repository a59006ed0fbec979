"""Attention in blocks of one document: the output and the gradients of plain attention, and no more products."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.models import blocked_attention, padding_free
from rlhf.models.blocked_attention import Document, attend_blocked, is_faster, is_supported, list_documents
from rlhf.models.padding_free import Layout, lay_out
from rlhf.models.varlen import attend_plainly
from tests.models.test_padding_free import padded, small
from tests.models.test_padding_free import test_states_and_gradients_are_those_of_each_row_alone as check_model

WIDTH = 8


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked_attention, "BLOCK", 3)
    monkeypatch.setattr(blocked_attention, "LEAST_BLOCK", 1)
    monkeypatch.setattr(blocked_attention, "OVERHEAD", -(10**9))


def layout() -> Layout:
    batch = padded("left")
    return lay_out(batch.ids, batch.attention_mask, batch.position_ids)


def pieces(found: Layout) -> list[Document]:
    return list_documents(found.documents, found.lengths, found.shared)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_output_and_gradients_are_those_of_plain_attention(
    groups: int, window: int | None, scale: float | None
) -> None:
    """Documents of 9, 7, 8, 6, 6 and 1 tokens, of which most share a prompt and one repeats another."""
    found = layout()
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, heads, found.ids.shape[1], WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (4, groups, groups)
    ]
    blocked = attend_blocked(*inputs, pieces(found), scale, window)
    plain = attend_plainly(*inputs, found.packing, scale, window)
    torch.testing.assert_close(blocked, plain, atol=1e-12, rtol=1e-12)
    pull = torch.randn(plain.shape, generator=generator, dtype=torch.float64)
    pairs = zip(torch.autograd.grad(blocked, inputs, pull), torch.autograd.grad(plain, inputs, pull), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_neox", "opt"])
def test_a_models_states_and_gradients_are_those_of_each_row_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*arguments: object) -> Tensor:
        calls.append(1)
        return attend_blocked(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(padding_free, "attend_blocked", counted)
    check_model(kind)
    assert len(calls) == 2  # one for each layer


def test_a_document_owns_its_last_tokens() -> None:
    found = pieces(layout())
    assert [(piece.first, piece.own, piece.length) for piece in found] == [
        (0, 9, 9),
        (9, 1, 7),
        (10, 3, 8),
        (13, 4, 6),
        (17, 1, 1),
    ]
    assert found[0].keys == slice(0, 9) and found[4].keys == slice(17, 18)
    assert isinstance(found[3].keys, Tensor) and found[3].keys.tolist() == [0, 1, 13, 14, 15, 16]


class Products(TorchDispatchMode):
    """Context manager that counts the multiplications of batched matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.multiplications = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket is torch.ops.aten.bmm:
            left, right = args
            self.multiplications += left.numel() * right.shape[2]
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("small_blocks")
def test_no_padding_no_shared_query_and_no_future_block_is_computed() -> None:
    """Blocks of at most 3 queries meet these numbers of keys: 3, 6, 9; 7; 8; 5 (3 queries), 6 (1); 1."""
    found = layout()
    states = torch.randn(1, 2, found.ids.shape[1], WIDTH)
    with Products() as counted:
        attend_blocked(states, states, states, pieces(found), None, None)
    pairs = 3 * (3 + 6 + 9) + 1 * 7 + 3 * 8 + 3 * 5 + 1 * 6 + 1 * 1
    assert counted.multiplications == 2 * pairs * 2 * WIDTH  # scores and values, two heads


def documents(*lengths: int) -> list[Document]:
    return [Document(0, length, slice(0, length), length) for length in lengths]


def test_short_documents_and_those_of_one_length_are_padded() -> None:
    assert is_faster(3, 4, documents(512, 100, 100, 100))
    assert not is_faster(3, 4, documents(512, 512, 512, 512))
    assert not is_faster(3, 4, documents(60, 20, 20, 20))
    # Many responses to one prompt: the padded way computes the prompt's queries for each.
    shared = [*documents(512), *(Document(0, 64, slice(0, 512), 512) for _ in range(15))]
    assert is_faster(3, 16, shared)


def test_other_arithmetic_takes_the_fused_kernel() -> None:
    states = torch.zeros(1, 1, 1, 1)
    assert is_supported(states) and not is_supported(states.bfloat16()) and not is_supported(states.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_supported(states)


def test_a_model_with_dropout_in_its_attention_takes_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked_attention, "OVERHEAD", -(10**9))
    monkeypatch.setattr(padding_free, "attend_blocked", lambda *_: pytest.fail("dropout would be left out"))
    model = small("llama", attention_dropout=0.5).train()
    assert padding_free.enable(model)
    padding_free.hidden_states(model.get_decoder(), layout())
