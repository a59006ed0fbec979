"""Padding-free passes: every distinct token once, with the states and gradients of each document alone."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlhf.data.collate import TokenBatch, collate
from rlhf.data.encoded_rows import Encoded
from rlhf.models import padding_free
from rlhf.models.adapters import LoRA, NoAdapter
from rlhf.models.language_model import LanguageModel
from rlhf.models.padding_free import lay_out
from rlhf.models.scalar import ScalarModel
from tests.models.conftest import FP32, corpus, move_adapter, random_model, spec

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
CAN = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4},
    "mistral": {"sliding_window": 4},
    "phi3": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "olmo2": {},
    "granite": {},
    "cohere": {},
    "mixtral": {"num_local_experts": 2},
}
CANNOT: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 4},  # no fused kernel
    "falcon": {},  # does not look the kernel up
}
PROMPT, OTHER = [5, 6, 7, 8, 9], [5, 6, 40, 41]
ROWS = [
    PROMPT + [10, 11, 12, 13],
    PROMPT + [10, 14],  # a response that begins like the one before
    PROMPT + [20, 21, 22],
    OTHER + [10, 11],
    OTHER + [10, 11],  # a repeated row
    [50],
]
DISTINCT = 9 + 1 + 3 + 4 + 0 + 1  # OTHER shares its first two tokens with PROMPT


def padded(side: str) -> TokenBatch:
    return collate([Encoded(row, [True] * len(row)) for row in ROWS], 0, side)  # type: ignore[arg-type]


def small(kind: str, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SHAPE | options))).eval()


def alone(model: PreTrainedModel) -> list[Tensor]:
    """Return the states of each row in a batch of its own, by the architecture's own code."""
    decoder = model.get_decoder()
    return [decoder(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0] for row in ROWS]


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_distinct_token_is_laid_out_once(side: str) -> None:
    batch = padded(side)
    layout = lay_out(batch.ids, batch.attention_mask, batch.position_ids)
    assert layout.ids.shape == (1, DISTINCT) and layout.documents.shape == (6, 9)
    assert torch.equal(layout.ids[0][layout.places][batch.attention_mask], batch.ids[batch.attention_mask])
    assert torch.equal(
        layout.position_ids[0][layout.places][batch.attention_mask], batch.position_ids[batch.attention_mask]
    )
    assert layout.saving == pytest.approx(1 - DISTINCT / 54)


def test_packed_documents_are_laid_out_apart() -> None:
    ids = torch.tensor([[5, 6, 7, 5, 6, 8, 9, 0], [5, 6, 8, 9, 3, 0, 0, 0]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 0, 0, 0]])
    layout = lay_out(ids, torch.tensor([[1] * 7 + [0], [1] * 5 + [0] * 3]).bool(), positions)
    assert layout.ids.tolist() == [[5, 6, 7, 8, 9, 3]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 2, 3, 4]]
    assert layout.documents.tolist() == [[0, 1, 2, 0, 0], [0, 1, 3, 4, 0], [0, 1, 3, 4, 5]]
    assert layout.places.tolist() == [[0, 1, 2, 0, 1, 3, 4, 0], [0, 1, 3, 4, 5, 0, 0, 0]]


@pytest.mark.parametrize("kind", CAN)
def test_states_and_gradients_are_those_of_each_row_alone(kind: str) -> None:
    model = small(kind, **CAN[kind])
    expected = alone(model)
    pull = [torch.randn(states.shape, generator=torch.Generator().manual_seed(1)) for states in expected]
    sum((states * one).sum() for states, one in zip(expected, pull, strict=True)).backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    assert padding_free.enable(model)
    batch = padded("left")
    layout = lay_out(batch.ids, batch.attention_mask, batch.position_ids)
    states = padding_free.hidden_states(model.get_decoder(), layout)
    assert states.shape == (DISTINCT, 32)
    found = [states[places[mask]] for places, mask in zip(layout.places, batch.attention_mask, strict=True)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    sum((states * one).sum() for states, one in zip(found, pull, strict=True)).backward()
    for name, weight in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(weight.grad, gradients[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("kind", CANNOT)
def test_other_architectures_keep_the_padded_pass(kind: str) -> None:
    model = small(kind, **CANNOT[kind])
    before = model.config._attn_implementation
    assert not padding_free.enable(model) and model.config._attn_implementation == before


def test_a_layer_that_mixes_tokens_in_another_way_is_found() -> None:
    class Shifting(torch.nn.Module):  # adds the state of the token before in the row, as a convolution would
        def forward(self, x: Tensor) -> Tensor:
            return x + x.roll(1, dims=1)

    model = small("llama")
    assert padding_free.enable(model) and padding_free.agrees(model.get_decoder(), torch.device("cpu"))
    model.model.norm = torch.nn.Sequential(model.model.norm, Shifting())
    assert not padding_free.agrees(model.get_decoder(), torch.device("cpu"))


def tokens_computed(model: LanguageModel, batch: TokenBatch) -> int:
    count: list[int] = []
    hook = model.base.get_input_embeddings().register_forward_pre_hook(lambda _, ids: count.append(ids[0].numel()))
    model.logprobs(batch)
    hook.remove()
    return count[0]


@pytest.mark.parametrize("adapter", [NoAdapter(), LoRA(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probabilities_and_gradients_equal_those_of_the_padded_pass(
    adapter: NoAdapter, checkpointing: bool
) -> None:
    batch = padded("left")
    results = []
    for is_free in (True, False):
        torch.manual_seed(3)
        model = spec().load(adapter, FP32, corpus)
        if checkpointing:
            model.gradient_checkpointing()
        assert model.padding_free
        model.padding_free = is_free
        move_adapter(model)
        assert tokens_computed(model, batch) == (DISTINCT if is_free else batch.ids.numel())
        logp, entropy = model.logprobs(batch, temperature=0.7, entropy=True)
        assert entropy is not None
        (logp.sum() + 0.1 * entropy.square().sum()).backward()
        results.append([logp, entropy, *(weight.grad for weight in model.trainable_parameters())])
    for free, plain in zip(*results, strict=True):
        torch.testing.assert_close(free, plain, atol=2e-5, rtol=1e-4)


def test_scores_and_values_equal_those_of_the_padded_pass() -> None:
    model = ScalarModel(random_model())
    for side in ("left", "right"):
        batch = padded(side)
        free = model.scores(batch), model.values(batch)[batch.attention_mask]
        model.language_model.padding_free = False
        plain = model.scores(batch), model.values(batch)[batch.attention_mask]
        model.language_model.padding_free = True
        torch.testing.assert_close(free, plain, atol=1e-5, rtol=1e-4)


def test_a_batch_without_padding_or_shared_tokens_is_computed_as_it_is() -> None:
    model = random_model()
    ids = torch.arange(10, 34).view(4, 6)
    assert model.layout(TokenBatch.of(ids, torch.ones_like(ids))) is None
    assert model.layout(TokenBatch.of(ids[:2].repeat(2, 1)[[0, 2, 1, 3]], torch.ones_like(ids))) is not None


def test_a_saved_model_names_no_kernel_of_ours(tmp_path: Any) -> None:
    random_model().save(tmp_path)
    assert padding_free.NAME not in (tmp_path / "config.json").read_text()
