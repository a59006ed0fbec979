"""Hidden states, log-probabilities, references and saving."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.data.collate import TokenBatch
from rlhf.errors import RunFailed
from rlhf.models.adapters import NoAdapter
from rlhf.models.language_model import LanguageModel
from rlhf.models.module_state import check_gradients
from rlhf.models.reference import start_reference
from tests.models.conftest import FP32, corpus, random_model, spec

Batch = tuple[Tensor, Tensor, Tensor]


def plain_logprobs(model: LanguageModel, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log-probabilities of one unpadded row from the architecture's own logits, [T-1]."""
    logits = model.base(input_ids=ids[None]).logits[0, :-1].float() / temperature
    return logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_those_of_each_row_alone(model: LanguageModel, batch: Batch, temperature: float) -> None:
    ids, mask, counts = batch
    logp, entropy = model.logprobs(TokenBatch.of(ids, mask, counts), temperature=temperature, entropy=True)
    assert logp.shape == ids.shape and entropy is not None and entropy.shape == ids.shape
    for row, length in enumerate(mask.sum(1).tolist()):
        expected = plain_logprobs(model, ids[row, :length], temperature)
        torch.testing.assert_close(logp[row, 2:length], expected[1:], atol=1e-5, rtol=1e-5)
    assert (logp[~counts] == 0).all() and (entropy[~counts] == 0).all() and (entropy[counts] > 0).all()


def test_logprobs_do_not_depend_on_the_padding_side(model: LanguageModel, batch: Batch) -> None:
    ids, mask, counts = batch
    right, _ = model.logprobs(TokenBatch.of(ids, mask, counts))
    shift = [10 - int(n) for n in mask.sum(1)]
    roll = lambda x: torch.stack([row.roll(s) for row, s in zip(x, shift, strict=True)])  # noqa: E731
    left_mask = roll(mask)
    positions = (left_mask.long().cumsum(1) - 1).clamp(min=0)
    left, _ = model.logprobs(TokenBatch.of(roll(ids), left_mask, roll(counts), positions))
    torch.testing.assert_close(left, roll(right), atol=1e-5, rtol=1e-5)
    both_mask, both = torch.nn.functional.pad(left_mask, (2, 3)), torch.nn.functional.pad(roll(ids), (2, 3))
    middle, _ = model.logprobs(TokenBatch.of(both, both_mask, torch.nn.functional.pad(roll(counts), (2, 3))))
    torch.testing.assert_close(middle[:, 2:-3], left, atol=1e-5, rtol=1e-5)


def test_packed_documents_do_not_attend_to_each_other(model: LanguageModel) -> None:
    first, second = torch.arange(10, 17), torch.arange(40, 45)
    ids = torch.cat([first, second, torch.zeros(3, dtype=torch.long)])[None]
    mask = ids > 0
    positions = torch.cat([torch.arange(7), torch.arange(5), torch.arange(3)])[None]
    counts = mask & (positions > 0)
    logp, _ = model.logprobs(TokenBatch.of(ids, mask, counts, positions))
    torch.testing.assert_close(logp[0, 1:7], plain_logprobs(model, first), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logp[0, 8:12], plain_logprobs(model, second), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "architecture",
    [
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32},
        {"model_type": "gemma2", "head_dim": 16, "final_logit_softcapping": 0.5},
        {"model_type": "granite", "logits_scaling": 4.0},
        {"model_type": "cohere", "logit_scale": 0.1},
        {"model_type": "qwen3", "head_dim": 16},
    ],
    ids=lambda a: a["model_type"],
)
def test_logprobs_of_other_architectures(architecture: dict) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2}
    if architecture["model_type"] == "gpt2":
        shape = {}
    attention = "eager" if architecture["model_type"] == "gemma2" else "sdpa"  # gemma2 has no fused kernel
    made = spec(architecture=shape | architecture, attention=attention).load(NoAdapter(), FP32, corpus)
    made.eval()
    ids = torch.arange(10, 16)
    logp, _ = made.logprobs(TokenBatch.of(ids[None], torch.ones(1, 6), torch.ones(1, 6)))
    torch.testing.assert_close(logp[0, 1:], plain_logprobs(made, ids), atol=1e-5, rtol=1e-5)


def test_the_key_value_cache_gives_the_same_states(model: LanguageModel, batch: Batch) -> None:
    ids, mask, _ = batch
    whole = model.hidden(TokenBatch.of(ids[:1], mask[:1]))
    positions = torch.arange(10)[None]
    first, cache = model.step(ids[:1, :6], mask[:1, :6], positions[:, :6])
    rest = []
    for t in range(6, 10):
        hidden, cache = model.step(ids[:1, t : t + 1], mask[:1, : t + 1], positions[:, t : t + 1], cache)
        rest.append(hidden)
    torch.testing.assert_close(torch.cat([first, *rest], dim=1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_gradient_checkpointing_changes_nothing_but_memory(every: int, batch: Batch) -> None:
    """Gradients have the same bits, and the layers that are recomputed are run twice."""
    ids, mask, counts = batch
    plain, saving = (random_model(num_hidden_layers=4) for _ in range(2))
    saving.gradient_checkpointing(every)
    runs = [0] * 4
    for index, layer in enumerate(saving.base.get_decoder().layers):

        def count(module: object, arguments: object, index: int = index) -> None:
            runs[index] += 1

        layer.mlp.register_forward_pre_hook(count)
    for each in (plain, saving):
        each.train().logprobs(TokenBatch.of(ids, mask, counts))[0].sum().backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert runs == {1: [2, 2, 2, 2], 2: [2, 1, 2, 1], 3: [2, 1, 1, 2]}[every]


def test_a_fully_masked_batch_still_has_a_graph(model: LanguageModel, batch: Batch) -> None:
    ids, mask, _ = batch
    logp, _ = model.logprobs(TokenBatch.of(ids, mask, torch.zeros_like(mask)))
    logp.sum().backward()
    assert (logp == 0).all() and model.trainable_parameters()[-1].grad is not None


def test_the_reference_is_unchanged_when_the_policy_moves(model: LanguageModel, batch: Batch) -> None:
    ids, mask, counts = batch
    reference = start_reference(model)
    before = reference.logprobs(TokenBatch.of(ids, mask, counts))
    logp, _ = model.logprobs(TokenBatch.of(ids, mask, counts))
    assert torch.equal(before, logp) and not before.requires_grad
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
    logp.sum().backward()
    optimizer.step()
    assert torch.equal(reference.logprobs(TokenBatch.of(ids, mask, counts)), before)
    assert not torch.equal(model.logprobs(TokenBatch.of(ids, mask, counts))[0], before)
    assert not reference.shared and model.training


def test_a_saved_model_is_a_plain_hugging_face_directory(model: LanguageModel, batch: Batch, tmp_path: Path) -> None:
    ids, mask, _ = batch
    model.save(tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(
        plain(input_ids=ids[:1]).logits, model.head(model.hidden(TokenBatch.of(ids[:1], mask[:1])))
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.chat_template == model.tokenizer.chat_template
    assert tokenizer.pad_token_id == model.pad_id != model.end_id
    assert plain.generation_config.eos_token_id == model.end_id
    assert not list(tmp_path.rglob("*.bin")) and not (tmp_path / "adapter").exists()


def test_a_saved_and_reloaded_model_is_equal(folder: Path, batch: Batch) -> None:
    ids, mask, counts = batch
    again = spec(folder.parent).load(NoAdapter(), FP32)  # a run directory does as well as its model folder
    assert torch.equal(
        again.logprobs(TokenBatch.of(ids, mask, counts))[0],
        random_model().logprobs(TokenBatch.of(ids, mask, counts))[0],
    )


def test_cast_keeps_rotary_frequencies(model: LanguageModel) -> None:
    frequencies = model.base.model.rotary_emb.inv_freq.clone()
    model.to(torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert torch.equal(model.base.model.rotary_emb.inv_freq, frequencies)


def test_dropout_can_be_switched_off() -> None:
    shape = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    made = spec(architecture=shape).load(NoAdapter(), FP32, corpus)
    ids, ones = torch.arange(10, 20)[None], torch.ones(1, 10)
    assert not torch.equal(made.hidden(TokenBatch.of(ids, ones)), made.hidden(TokenBatch.of(ids, ones)))
    made.disable_dropout()
    assert torch.equal(made.hidden(TokenBatch.of(ids, ones)), made.hidden(TokenBatch.of(ids, ones)))


def test_a_parameter_without_gradient_is_reported(model: LanguageModel) -> None:
    with pytest.raises(RunFailed, match="no gradient"):
        check_gradients(model)


def test_copies_are_independent(model: LanguageModel) -> None:
    twin = copy.deepcopy(model)
    twin.base.model.norm.weight.data.zero_()
    assert (model.base.model.norm.weight == 1).all()
