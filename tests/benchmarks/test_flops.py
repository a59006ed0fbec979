"""FLOP formulas against PyTorch's counter and against explicit attention masks."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import models
from benchmarks.cases import CASES, count_amounts
from benchmarks.flops import Shape, Work, forward_flops, row_work, training_flops, tree_work

ROWS, LENGTH, RANK = 2, 24, 4
CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=96,
    attn_implementation="eager",  # all pairs of positions, which the counter sees as matrix products
)
FULL = Work(ROWS * LENGTH, ROWS * LENGTH * LENGTH, ROWS * LENGTH)


@pytest.fixture
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(CONFIG)


def counted(model, backward: bool) -> int:
    ids = torch.randint(96, (ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids, use_cache=False).logits.sum()
        if backward:
            loss.backward()
    return counter.get_total_flops()


def test_forward_equals_the_counter(model):
    assert counted(model, backward=False) == forward_flops(Shape.of(CONFIG), FULL)


def test_training_equals_the_counter(model):
    assert counted(model, backward=True) == training_flops(Shape.of(CONFIG), FULL)


def test_training_of_adapters_equals_the_counter(model):
    adapted = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
    shape = Shape.of(CONFIG)
    # The embedding is frozen, so the first layer's three projections need no gradient of their input.
    saved = sum(2 * FULL.tokens * (a * b + a * RANK) for a, b in shape.linear_layers[:3])
    assert counted(adapted, backward=True) == training_flops(shape, FULL, RANK) - saved


@pytest.mark.parametrize(("prompt", "responses"), [(5, [3, 2]), (1, [1]), (7, [4, 4, 4])])
def test_shared_prompts_equal_an_explicit_mask(prompt, responses):
    document = torch.cat([torch.zeros(prompt), *[torch.full((n,), float(i + 1)) for i, n in enumerate(responses)]])
    position = torch.arange(len(document))
    seen = (document[:, None] == document[None]) | (document[None] == 0)
    expected = (seen & (position[None] <= position[:, None])).sum()
    assert tree_work(prompt, responses) == Work(len(document), int(expected), sum(responses))


def test_a_row_equals_a_tree_without_responses():
    assert row_work(9, 0) == tree_work(9, [])


@pytest.mark.parametrize(("name", "millions"), [("12m", 12), ("31m", 31), ("135m", 135)])
def test_models_have_the_sizes_that_name_them(name, millions):
    config = LlamaConfig(**models.SIZES[name], vocab_size=models.VOCABULARY)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert round(model.num_parameters() / 1e6) in (millions, millions - 1)
    linear = sum(a * b for a, b in Shape.of(config).linear_layers) * config.num_hidden_layers
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    assert linear + norms + config.vocab_size * config.hidden_size == model.num_parameters()


def test_amounts_of_pairs_count_a_prompt_once_in_flops_and_twice_in_tokens():
    rows = [{"prompt": [1] * 10, "chosen": [2] * 4, "rejected": [3] * 6}]
    shape = Shape.of(CONFIG)
    amounts = count_amounts(CASES["reward_model"], shape, rows)
    assert amounts.tokens == 2 * 10 + 4 + 6 and amounts.samples == 1
    # 55 pairs within the prompt, then 10 * 4 + 10 and 10 * 6 + 21 of the two responses
    assert amounts.flops == 3 * forward_flops(shape, Work(20, 55 + 50 + 81, 0))


def test_amounts_of_sampling_follow_the_measured_length():
    rows = [{"ids": [1] * 10}]
    shape, case = Shape.of(CONFIG), CASES["sampling"]
    amounts = count_amounts(case, shape, rows, response=3.0)
    assert amounts.flops == forward_flops(shape, tree_work(10, [3] * 8))
    assert (amounts.tokens, amounts.samples) == (8 * 13, 8)
