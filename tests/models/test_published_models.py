"""Published models by name: weights, adapted layers, forward passes and chat templates, from their YAMLs alone."""

import copy
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from rlhf.data.chat_templates import TEMPLATES, TOKENS
from rlhf.data.collate import TokenBatch
from rlhf.data.encoding import encode_dialogue, encode_prompt
from rlhf.data.records import Message
from rlhf.data.rendering import render
from rlhf.data.template_check import check_template
from rlhf.data.tokenizer import train_tokenizer
from rlhf.errors import UserError
from rlhf.models.adapters import LoRA, NoAdapter
from rlhf.models.fake_tensors import FakeWeights, use_fake_weights
from rlhf.models.language_model import LanguageModel
from rlhf.models.scalar import ScalarModel
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.continuous_batching import ContinuousBatch, can_decode_in_slots
from rlhf.testing import tiny_model
from tests.models.conftest import FP32, corpus, spec
from tests.models.published import COUNTS, FAMILIES, MODULES, option, random_weights, tiny

DIALOGUE = [
    Message("system", "Be brief."),
    Message("user", "Hello!"),
    Message("assistant", "Hi there."),
    Message("user", "Where does Mia live?"),
    Message("assistant", "Mia lives in Rome."),
]


def published_template(name: str) -> str:
    """Return TRL's copy of a published chat template."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        pytest.skip("TRL is not installed")
    return (Path(found.origin).parent / "chat_templates" / f"{name}.jinja").read_text()


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """Return the linear layers of the decoder layers."""
    return [part for name, part in model.named_modules() if isinstance(part, nn.Linear) and ".layers." in name]


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_models_have_the_published_number_of_weights(name: str, count: int) -> None:
    assert random_weights(name).parameters() == count


@pytest.mark.parametrize("name", COUNTS)
def test_lora_adapts_every_linear_layer_of_the_decoder(name: str) -> None:
    """The number of trained weights is rank * (inputs + outputs) of each layer."""
    source, adapter = random_weights(name), LoRA(rank=4)
    kind = source.config().model_type
    whole = source.build_on_meta()
    expected = 4 * sum(layer.in_features + layer.out_features for layer in linear_layers(whole))
    with use_fake_weights(FakeWeights()):
        base = source.load_weights(AutoModelForCausalLM, adapter, FP32, tiny_model().tokenizer)
        assert base.get_input_embeddings().num_embeddings == source.config().vocab_size  # the tokenizer has 300
        model = adapter.apply(base)
    adapted = [part.rpartition(".")[2] for part, module in model.named_modules() if hasattr(module, "lora_A")]
    assert sorted(adapted) == sorted(MODULES[kind] * source.config().num_hidden_layers)
    assert sum(value.numel() for value in model.parameters() if value.requires_grad) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_can_be_named_in_every_family(family: str) -> None:
    model = tiny(FAMILIES[family]).build_on_meta()
    LoRA(modules=list(MODULES[family])).check_modules(model)
    wrong = "q_proj" if family == "gpt_neox" else "query_key_value"
    with pytest.raises(UserError, match=f"adapter.modules={wrong}: the model has no such linear layer") as error:
        LoRA(modules=[wrong]).check_modules(model)
    names = re.search(r"of its linear layers: ([\w, ]+)", str(error.value))
    assert names is not None and set(names[1].split(", ")) - {"embed_out", "lm_head"} == set(MODULES[family])


def build(family: str) -> LanguageModel:
    torch.manual_seed(0)
    return tiny(FAMILIES[family], chat_template=None).load(NoAdapter(), FP32, corpus).eval()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_forward_passes_equal_those_of_transformers(family: str) -> None:
    """Every padded or packed row gets the values that transformers computes for this row alone."""
    model = build(family)
    rows = [torch.randint(6, 260, (length,), generator=torch.Generator().manual_seed(length)) for length in (11, 7)]
    states, logps = [], []
    for row in rows:
        output = model.base(input_ids=row[None], output_hidden_states=True)
        states.append(output.hidden_states[-1][0])
        logps.append(output.logits[0, :-1].log_softmax(-1).gather(-1, row[1:, None])[:, 0])
    assert (logps[0] - logps[0].mean()).abs().max() > 0.1  # the model distinguishes its inputs
    first, second = rows
    right = torch.stack([first, torch.cat([second, torch.zeros(4, dtype=torch.long)])])
    left = torch.stack([first, torch.cat([torch.zeros(4, dtype=torch.long), second])])
    for ids, start in ((right, 0), (left, 4)):
        mask = ids > 0
        hidden = model.hidden(TokenBatch.of(ids, mask))
        logp, _ = model.logprobs(TokenBatch.of(ids, mask, mask))
        torch.testing.assert_close(hidden[0], states[0], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(hidden[1, start : start + 7], states[1], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(logp[0, 1:], logps[0], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(logp[1, start + 1 : start + 7], logps[1], atol=2e-5, rtol=1e-5)
    positions = torch.cat([torch.arange(11), torch.arange(7)])[None]
    packed = torch.cat(rows)[None]
    hidden = model.hidden(TokenBatch.of(packed, torch.ones_like(packed), position_ids=positions))[0]
    torch.testing.assert_close(hidden, torch.cat(states), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_decoding_with_a_cache_equals_one_pass(family: str) -> None:
    model = build(family)
    ids = torch.arange(10, 22)[None]
    expected = model.hidden(TokenBatch.of(ids, torch.ones_like(ids)))
    states, cache = [], None
    for start, stop in ((0, 9), (9, 10), (10, 11), (11, 12)):
        mask, positions = torch.ones(1, stop, dtype=torch.long), torch.arange(start, stop)[None]
        hidden, cache = model.step(ids[:, start:stop], mask, positions, cache)
        states.append(hidden)
    torch.testing.assert_close(torch.cat(states, dim=1), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_decoding_in_slots_equals_one_pass(family: str, samples: int) -> None:
    """With prompts in the slots (1 sample) or shared between them (2), with windows and heads that share keys."""
    model = build(family)
    if family == "gemma3_text":
        assert model.config.sliding_window < 9 + 8  # windows matter
    assert can_decode_in_slots(model)
    ids = torch.tensor([[20, 21, 22, 23, 24, 25, 26, 27, 28], [0, 0, 30, 31, 32, 33, 34, 35, 36]])
    mask = ids > 0
    sampler = AncestralSampler(8, samples=samples)
    noise = torch.rand(2 * samples, 8, generator=torch.Generator().manual_seed(0))
    response, logp = ContinuousBatch(model, ids, mask, noise, samples, 3, sampler._draw).run()
    for row in range(2 * samples):
        prompt = ids[row // samples][mask[row // samples]]
        whole = torch.cat([prompt, response[row]])[None]
        expected, _ = model.logprobs(TokenBatch.of(whole, torch.ones_like(whole), torch.ones_like(whole)))
        own = logp[row] != 0
        assert own.sum() > 1
        torch.testing.assert_close(logp[row][own], expected[0, len(prompt) :][own], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_and_its_scalar_model_are_read_again(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save(tmp_path / "policy")
    ids = torch.arange(10, 22)[None]
    again = spec(tmp_path / "policy", architecture=None).load(LoRA(rank=2), FP32).eval()
    torch.testing.assert_close(
        again.hidden(TokenBatch.of(ids, torch.ones_like(ids))), model.hidden(TokenBatch.of(ids, torch.ones_like(ids)))
    )
    ScalarModel(model).save(tmp_path / "critic")
    decoder, head = spec(tmp_path / "critic", architecture=None).load_decoder(LoRA(rank=2), FP32)
    assert head is not None and head.shape == (1, 32)
    torch.testing.assert_close(
        decoder.eval().hidden(TokenBatch.of(ids, torch.ones_like(ids))),
        model.hidden(TokenBatch.of(ids, torch.ones_like(ids))),
    )


# Chat templates


def tokenizer_with(chat_template: str, tokens: tuple[str, ...], eos: str) -> PreTrainedTokenizerBase:
    """Return a small tokenizer with a chat template and the special tokens that it writes."""
    found: Any = copy.deepcopy(train_tokenizer(corpus(), 300))
    found.add_special_tokens({"additional_special_tokens": list(tokens), "eos_token": eos, "bos_token": "<bos>"})
    found.chat_template = chat_template
    return found


GEMMA = ("<start_of_turn>", "<end_of_turn>")
#: Option -> (TRL's copy of the published template, its tokens, EOS), where the tokenizer's own template is used.
OWN = {
    "qwen2_5_0_5b": ("qwen2_5", TOKENS["chatml"], "<|endoftext|>"),
    "gemma3_270m": ("gemma3", GEMMA, "<eos>"),
}


@pytest.mark.parametrize("name", [name for name in COUNTS if not name.startswith("smollm2")])
def test_chat_templates_can_be_used_for_training(name: str) -> None:
    """Those of SmolLM2 are covered by the tests of the real model."""
    chosen = option(name)["chat_template"]
    assert (chosen is None) == (name in OWN)
    if chosen is None:
        file, tokens, eos = OWN[name]
        tokenizer = tokenizer_with(published_template(file), tokens, eos)
    else:
        tokenizer = tokenizer_with(TEMPLATES[chosen], TOKENS.get(chosen, ()), "<|endoftext|>")
    for dialogue in (DIALOGUE, DIALOGUE[1:3], DIALOGUE[:3]):
        check_template(tokenizer, dialogue)
        encoded = encode_dialogue(tokenizer, dialogue)
        trained = [index for index, counts in zip(encoded.ids, encoded.mask, strict=True) if counts]
        text = tokenizer.decode(trained)
        assert all(message.content in text for message in dialogue if message.role == "assistant")
        assert not any(message.content in text for message in dialogue if message.role != "assistant")
    assert DIALOGUE[3].content in tokenizer.decode(encode_prompt(tokenizer, DIALOGUE[:-1]))


def test_chatml_prompts_are_those_of_qwen3_whose_own_template_cannot_train_on_several_turns() -> None:
    own = tokenizer_with(published_template("qwen3"), TOKENS["chatml"], "<|im_end|>")
    ours = tokenizer_with(TEMPLATES["chatml"], TOKENS["chatml"], "<|im_end|>")
    for prompt in (DIALOGUE[1:2], DIALOGUE[:2], DIALOGUE[:-1]):
        assert render(ours, prompt, generation_prompt=True) == render(own, prompt, generation_prompt=True)
    with pytest.raises(UserError, match="rewrites earlier turns"):
        check_template(own, DIALOGUE)


def test_the_own_template_of_llama_3_2_writes_a_date() -> None:
    tokens = TOKENS["llama3"]
    own = tokenizer_with(published_template("llama3_2"), tokens, "<|eot_id|>")
    ours = tokenizer_with(TEMPLATES["llama3"], tokens, "<|eot_id|>")
    assert "Today Date: " in render(own, DIALOGUE[1:2])
    assert "Date" not in render(ours, DIALOGUE[1:2])
    user = render(own, DIALOGUE[1:2], generation_prompt=True).partition("<|eot_id|>")[2]  # after the system message
    assert render(ours, DIALOGUE[1:2], generation_prompt=True) == "<bos>" + user


@pytest.mark.parametrize("name", ["pythia_160m", "opt_125m"])
def test_adapters_can_be_trained_on_base_models_with_their_template(name: str, tmp_path: Path) -> None:
    """An adapter leaves the embedding frozen, so the template must not write tokens that the weights never saw."""
    model = tiny(name, chat_template=None).load(NoAdapter(), FP32, corpus)
    model.save(tmp_path)
    plain: Any = train_tokenizer(corpus(), 290)
    plain.add_special_tokens({"eos_token": "</s>", "additional_special_tokens": []}, replace_extra_special_tokens=True)
    plain.chat_template = None
    for file in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).unlink(missing_ok=True)
    plain.save_pretrained(tmp_path)
    chosen = option(name)["chat_template"]
    loaded = spec(tmp_path, architecture=None, chat_template=chosen).load(LoRA(rank=2), FP32)
    assert loaded.tokenizer.convert_ids_to_tokens(loaded.end_id) == "</s>"
    with pytest.raises(UserError, match="are new to this model"):
        spec(tmp_path, architecture=None, chat_template="chatml").load(LoRA(rank=2), FP32)
