"""Sampling: the log-probabilities are the policy's, and no optimisation changes a response."""

import pytest
import torch

from rlhf.errors import UserError
from rlhf.sampler.ancestral import AncestralSampler, draw_tokens

from .conftest import data


@pytest.fixture(scope="module")
def prompts():
    return data("prompt", 12, 4).train


def test_log_probabilities_equal_those_of_a_forward_pass(load, prompts):
    policy = load()
    for temperature in (1.0, 0.7):
        rollout = AncestralSampler(12, temperature).sample(policy, prompts, seed=0)
        logp, _ = policy.logprobs(rollout.tokens, temperature)
        logp = logp[:, -rollout.mask.shape[1] :]
        torch.testing.assert_close(logp * rollout.mask, rollout.logp, atol=1e-5, rtol=1e-5)


def test_a_response_does_not_depend_on_the_rest_of_the_batch(load, prompts):
    """Dropping ended rows, padding and chunking change nothing: each row equals itself alone in the batch."""
    policy = load()
    whole = AncestralSampler(12).sample(policy, prompts, seed=0)
    chunked = AncestralSampler(12, batch_size=5).sample(policy, prompts, seed=0)
    assert whole.texts == chunked.texts
    torch.testing.assert_close(whole.logp, chunked.logp, atol=1e-5, rtol=1e-5)


def test_greedy_equals_transformers_generate(load, prompts):
    policy = load().frozen()
    rollout = AncestralSampler(12, temperature=0).sample(policy, prompts, seed=0)
    generated = policy.model.generate(
        input_ids=rollout.prompt_ids,
        attention_mask=rollout.prompt_mask.long(),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=policy.end_id,
        pad_token_id=policy.pad_id,
    )[:, rollout.prompt_ids.shape[1] :]
    for row, keep, expected in zip(rollout.response_ids, rollout.mask, generated, strict=True):
        count = int(keep.sum())
        assert row[:count].tolist() == expected[:count].tolist()


def test_samples_of_a_prompt_are_adjacent_and_differ(load, prompts):
    rollout = AncestralSampler(12, samples=3).sample(load(), prompts[:4], seed=0)
    assert [prompt.id for prompt in rollout.prompts] == [prompt.id for prompt in prompts[:4] for _ in range(3)]
    assert len(rollout.tokens) == 12
    assert len(set(rollout.texts)) > 4


def test_the_mask_ends_with_the_first_end_of_turn(load, prompts):
    policy = load()
    policy.base.get_output_embeddings().weight.data[policy.end_id] *= 3  # makes it likely
    rollout = AncestralSampler(12, temperature=2.0).sample(policy, prompts * 8, seed=0)
    is_end = rollout.response_ids.eq(policy.end_id) & rollout.mask
    assert rollout.ended.any() and not rollout.ended.all()
    assert torch.equal(is_end.any(1), rollout.ended)
    assert torch.equal(is_end.sum(1), rollout.ended.long())  # counted once, and no token after it
    last = rollout.lengths - 1
    assert torch.equal(is_end.gather(1, last[:, None])[:, 0], rollout.ended)


def test_special_tokens_inside_a_response_are_counted(load, prompts):
    rollout = AncestralSampler(8, samples=8).sample(load(), prompts, seed=0)
    tokenizer, end = load().tokenizer, load().end_id
    expected = []
    for ids, own, text in zip(rollout.response_ids, rollout.mask, rollout.texts, strict=True):
        said = [token for token in ids[own].tolist() if token != end]
        expected.append(tokenizer.decode(said).strip() != text)
    assert rollout.special_tokens == expected and 0 < sum(expected) < len(expected)  # random weights write some
    assert rollout.diagnostics()["special_tokens"].item() == pytest.approx(sum(expected) / len(expected))
    assert rollout.rows(torch.tensor([3, 0])).special_tokens == [expected[3], expected[0]]


@pytest.mark.parametrize("vocabulary", [4, 256, 700])
def test_sampled_frequencies_match_the_probabilities(vocabulary):
    """Of four tokens with the others impossible, in one block of the cumulative sum or in several."""
    probability = torch.zeros(vocabulary)
    places = [0, 1, 2, 3] if vocabulary == 4 else [0, 1, vocabulary // 2, vocabulary - 1]
    probability[places] = torch.tensor([0.5, 0.0, 0.3, 0.2])
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    tokens, logp = draw_tokens((probability.log() + 7).expand(10_000, -1), uniform)  # logits have no fixed sum
    assert torch.bincount(tokens, minlength=vocabulary)[places].tolist() == [5000, 0, 3000, 2000]
    torch.testing.assert_close(logp, probability.log()[tokens])


def test_the_largest_random_number_draws_a_possible_token():
    """Rounding puts it at the sum of the weights, after which no token is; the last ones here are impossible."""
    logits = torch.full((1, 900), -torch.inf)
    logits[0, :300] = torch.randn(300, generator=torch.Generator().manual_seed(0))
    token, logp = draw_tokens(logits, torch.tensor([1 - 2**-24]))
    assert token.item() == 299 and torch.isfinite(logp).all()


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"), [(2, 1.0, [0, 1]), (0, 0.7, [0, 1]), (0, 0.4, [0]), (0, 1.0, [0, 1, 2])]
)
def test_top_k_and_top_p_truncate_the_distribution(top_k, top_p, kept):
    probability = torch.tensor([0.5, 0.3, 0.2])
    sampler = AncestralSampler(top_k=top_k, top_p=top_p)
    uniform = (torch.arange(1000) + 0.5) / 1000
    tokens, logp = sampler._draw(probability.log().expand(1000, 3), uniform)
    assert tokens.unique().tolist() == kept
    torch.testing.assert_close(logp, (probability / probability[kept].sum()).log()[tokens])


def test_a_prompt_beyond_the_context_is_refused(load, prompts):
    with pytest.raises(UserError, match="data.max_prompt_length"):
        AncestralSampler(120).sample(load(), prompts, seed=0)
