"""Continuous batching: rows that take over slots get the tokens that they get in batches of their own."""

import pytest
import torch

from rlhf.sampler import continuous_batching
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.continuous_batching import ContinuousBatch, can_decode_in_slots

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7], [12, 13, 14, 15, 16], [5, 6, 9, 10]]


@pytest.fixture
def batch():
    """Return prompts of several lengths, padded on the left."""
    longest = max(len(prompt) for prompt in PROMPTS)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in PROMPTS])
    return ids, mask


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("slots", [1, 2, 5, 64])
def test_tokens_are_those_of_chunks_with_the_cache_of_transformers(samples, slots, load, batch, monkeypatch):
    policy = load()
    ids, mask = batch
    sampler = AncestralSampler(12, samples=samples)
    draw = sampler._draw

    def draw_with_ends(logits, noise):  # a sixth of the tokens end a response, so that lengths vary
        tokens, logp = draw(logits, noise)
        return torch.where(tokens % 6 == 0, policy.end_id, tokens), logp

    monkeypatch.setattr(sampler, "_draw", draw_with_ends)
    noise = sampler._noise(len(ids) * samples, 12, seed=3)
    assert can_decode_in_slots(policy)
    found, logp = ContinuousBatch(policy, ids, mask, noise, samples, slots, sampler._draw).run()
    with torch.no_grad():
        expected, expected_logp = sampler._decode(policy, ids, mask, noise, samples)
    own = (expected == policy.end_id).long().cumsum(1) - (expected == policy.end_id).long() == 0
    lengths = own.sum(1)
    assert lengths.min() < lengths.max()
    assert torch.equal(found[own], expected[own])
    torch.testing.assert_close(logp[own], expected_logp[own], atol=1e-5, rtol=1e-5)
    assert (logp[~own] == 0).all() and (found[~own] == policy.end_id).all()


def lengths_to_noise(lengths: list[int], longest: int) -> torch.Tensor:
    """Return noise that makes ``draw_by_noise`` end each row after so many tokens."""
    noise = torch.zeros(len(lengths), longest)
    for row, length in enumerate(lengths):
        noise[row, length - 1] = 0.9
    return noise


@pytest.mark.parametrize(
    ("lengths", "slots", "steps"),
    [
        # Slot 0: 6 tokens, then 2, then 6, the last one in round 14; slot 1: 2, 2 and 6. Chunks of two need 15 steps.
        ([6, 2, 2, 6, 2, 6], 2, 13),
        ([4, 4, 4, 4], 4, 3),  # one chunk
        ([1, 1, 1, 1], 2, 0),  # a first token needs the prompt alone
        ([3, 1, 1, 1, 1, 1], 2, 2),  # slot 1 takes three of the others while slot 0 has three tokens, then one each
    ],
)
def test_a_free_slot_takes_the_next_row(lengths, slots, steps, load, monkeypatch):
    policy, count = load(), 0
    step = continuous_batching.decode

    def counted(*arguments):
        nonlocal count
        count += 1
        return step(*arguments)

    def draw_by_noise(logits, noise):
        return torch.where(noise > 0.5, policy.end_id, 7), logits.new_zeros(len(logits))

    monkeypatch.setattr(continuous_batching, "decode", counted)
    ids = torch.tensor([[5, 6, 7 + row] for row in range(len(lengths))])
    mask, noise = torch.ones_like(ids).bool(), lengths_to_noise(lengths, 8)
    found, _ = ContinuousBatch(policy, ids, mask, noise, 1, slots, draw_by_noise).run()
    assert ((found == 7).sum(1) + 1).tolist() == lengths
    assert count == steps


def test_a_prompt_is_computed_once_for_its_rows(load, batch, monkeypatch):
    """Also if they get their slots at different times: four prompts of 3 rows in two slots."""
    policy, computed = load(), []
    compute = continuous_batching.hidden_states

    def counted(decoder, layout, states):
        computed.append(layout.ids.shape[1])
        return compute(decoder, layout, states)

    can_decode_in_slots(policy)
    monkeypatch.setattr(continuous_batching, "hidden_states", counted)
    sampler = AncestralSampler(4, samples=3)
    ContinuousBatch(policy, *batch, sampler._noise(12, 4, 0), 3, 2, sampler._draw).run()
    assert sum(computed) == sum(len(prompt) for prompt in PROMPTS)
