"""Rejection sampling: statistics of best-of-K, several temperatures, and the rules of selection."""

from collections import Counter

import pytest
import torch

from rlhf.data.records import Message, Prompt
from rlhf.errors import UserError
from rlhf.reward.gold import GoldReward
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.best_of_k import BestOfK, build_rollout, interleave
from rlhf.stage.batch_order import derive_seed
from rlhf_rejection_sampling.selection import Candidate, best_of_k_statistics, select_responses

from .conftest import data, fit
from .test_rejection_sampling import rows_of, stage_on

# -- several temperatures --------------------------------------------------------------------------------------------


def test_responses_are_divided_over_the_temperatures(load):
    sampler = BestOfK(8, samples=5, temperatures=[0.0, 1.0, 1.5])
    assert sampler.spread == [0.0, 0.0, 1.0, 1.0, 1.5]
    assert not sampler.exact and BestOfK().exact
    policy, prompts = load().eval(), data("prompt", 6, 2).train
    found = sampler.sample(policy, prompts, seed=3)
    assert found.prompts == [prompt for prompt in prompts for _ in range(5)]
    greedy = AncestralSampler(8, 0.0).sample(policy, prompts, seed=9)
    for index, text in enumerate(greedy.texts):
        assert found.texts[5 * index : 5 * index + 2] == [text, text]
    assert len({text for text in found.texts[4::5]}) > 1
    # The joined rollout is whole: scoring its tokens gives what was sampled.
    logp, _ = policy.logprobs(found.tokens)
    own = logp[:, -found.mask.shape[1] :]
    torch.testing.assert_close(own[2::5], found.logp[2::5], atol=1e-4, rtol=1e-4)
    assert found.texts == sampler.sample(policy, prompts, seed=3).texts


def test_interleaving_keeps_rows_together(load):
    policy, prompts = load().eval(), data("prompt", 3, 2).train
    parts = [AncestralSampler(4, samples=2).sample(policy, prompts, 0), AncestralSampler(8).sample(policy, prompts, 1)]
    joined = interleave(parts, 3, policy.pad_id)
    assert joined.texts[0:2] == parts[0].texts[0:2] and joined.texts[2] == parts[1].texts[0]
    assert joined.texts[3:5] == parts[0].texts[2:4] and joined.texts[8] == parts[1].texts[2]
    assert joined.mask.sum() == sum(part.mask.sum() for part in parts)


def test_more_temperatures_than_responses_are_refused():
    with pytest.raises(UserError, match="type sampler.samples=3 or more"):
        BestOfK(samples=2, temperatures=[0.5, 1.0, 1.5])


def test_responses_read_from_text_score_as_sampled_ones(load):
    policy, prompts = load().eval(), data("prompt", 6, 2).train
    sampled = AncestralSampler(12).sample(policy, prompts, 0)
    written = build_rollout(policy, sampled.prompts, sampled.texts, sampled.ended.tolist())
    assert torch.equal(GoldReward()(written), GoldReward()(sampled))
    assert written.mask.sum(1).tolist() != [0] * 6 and torch.equal(written.ended, sampled.ended)


# -- selection -------------------------------------------------------------------------------------------------------


def candidates(scores: list[list[float]]) -> list[Candidate]:
    prompts = [Prompt((Message("user", f"q{n}"),)) for n in range(len(scores))]
    return [
        Candidate(prompt, f"r{n}{k}", True, 1.0, score)
        for n, (prompt, row) in enumerate(zip(prompts, scores, strict=True))
        for k, score in enumerate(row)
    ]


def test_selection_rules_by_hand():
    found = candidates([[1, 5, 4], [2, 3, 0], [9, 8, 7]])

    def selected(select):
        return [candidate.response for candidate in select_responses(found, select, 3, seed=0)]

    assert selected("best_per_prompt") == ["r01", "r11", "r20"]
    assert selected("top_overall") == ["r20", "r21", "r22"]
    assert [response[1] for response in selected("random_per_prompt")] == ["0", "1", "2"]
    overall = selected("random_overall")
    assert len(set(overall)) == 3 and overall == sorted(overall, key=lambda response: response[1])


def test_tied_responses_are_selected_equally_often():
    """With a two-valued rule most responses are tied: no preference for the first response or the first temperature."""
    draws, tops = Counter(), Counter()
    for seed in range(200):
        found = candidates([[1, 1, 0], [1, 1, 1]])
        draws.update(
            candidate.response for candidate in select_responses(found, "best_per_prompt", 2, derive_seed(seed, "pick"))
        )
        tops.update(
            candidate.response for candidate in select_responses(found, "top_overall", 1, derive_seed(seed, "pick"))
        )
    assert all(70 < draws[response] < 130 for response in ("r00", "r01")) and draws["r02"] == 0
    assert all(40 < draws[response] < 95 for response in ("r10", "r11", "r12"))
    assert all(20 < tops[response] < 65 for response in ("r00", "r01", "r10", "r11", "r12"))


def test_tied_best_responses_share_the_statistics_of_temperatures():
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    found = best_of_k_statistics(scores, [0.7, 0.7, 1.3, 1.3], candidates([[1]]))["temperatures"]
    assert found["0.7"]["share_of_best"] == pytest.approx(1 / 3)  # 1/2, 1/2 and 0
    assert found["1.3"]["share_of_best"] == pytest.approx(2 / 3)


def test_random_controls_are_matched_and_ignore_the_reward():
    """As many responses, drawn uniformly: independent of the reward."""
    found = candidates([[1, 5], [2, 3]])
    draws = Counter()
    for seed in range(200):
        draws.update(
            candidate.response
            for candidate in select_responses(found, "random_per_prompt", 2, derive_seed(seed, "pick"))
        )
        assert len(select_responses(found, "random_overall", 2, seed)) == 2
    assert all(70 < count < 130 for count in draws.values()) and len(draws) == 4


def test_a_repeated_response_is_selected_once():
    found = candidates([[5, 5], [4, 1]])
    found[1].response = found[0].response
    assert [c.response for c in select_responses(found, "top_overall", 2, seed=0)] == ["r00", "r10"]


def often_ending(policy):
    """Return the policy with a likely end-of-turn: many of its responses end, and some are truncated."""
    head = policy.base.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]).index_fill_(0, torch.tensor(policy.end_id), 4.0))
    return policy


def test_a_truncated_response_is_not_a_duplicate_of_a_whole_one():
    found = candidates([[5, 4]])
    found[1].response, found[0].ended = found[0].response, False
    assert [c.ended for c in select_responses(found, "top_overall", 2, seed=0)] == [False, True]


@pytest.mark.parametrize(
    ("how", "penalty", "treated"),
    [("auto", 1.0, lambda x: x), ("replace", 1.0, lambda x: -1.0), ("subtract", 2.5, lambda x: x - 2.5)],
)
def test_a_truncated_candidate_is_selected_by_its_treated_score(how, penalty, treated, load, tmp_path, monkeypatch):
    """A whole response keeps its score; ``missing_eos`` treats a truncated one, by default keeping a rule's score."""
    seen = []
    monkeypatch.setattr(
        "rlhf_rejection_sampling.stage.select_responses",
        lambda found, *rest: seen.extend(found) or select_responses(found, *rest),
    )
    stage = stage_on(load, model=often_ending(load()), missing_eos=how, missing_eos_penalty=penalty)
    fit(stage, tmp_path, limit_val_batches=0)
    expected = [float(len(set(c.response))) if c.ended else treated(float(len(set(c.response)))) for c in seen]
    assert [c.score for c in seen] == pytest.approx(expected) and 0 < sum(c.ended for c in seen) < len(seen)
    best = [max(expected[first : first + 4]) for first in range(0, len(seen), 4)]
    assert [row["score"] for row in rows_of(tmp_path)] == pytest.approx(best)
    assert stage.final_metrics()["reward_selected"] == pytest.approx(sum(best) / len(best))


def test_truncated_responses_are_trained_on_without_an_end(load, tmp_path):
    stage = stage_on(load, model=often_ending(load()))
    policy = stage.policy
    fit(stage, tmp_path, limit_val_batches=0)
    ended = [row["ended"] for row in rows_of(tmp_path) if row["response"]]
    rows = [*stage.held_out, *stage.examples]
    assert 0 < sum(ended) < len(ended) == len(rows)
    assert [row.ids[-1] == policy.end_id and row.mask[-1] for row in rows] == ended
    everything = [row["ended"] for row in rows_of(tmp_path)]
    assert stage.final_metrics()["cut_share"] == pytest.approx(everything.count(False) / len(everything))
