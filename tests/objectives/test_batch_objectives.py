"""Objectives that couple the responses of a batch, or read scores: values by hand and special cases."""

import math
from dataclasses import replace

import pytest
import torch

from rlhf.objective import PairContext, PairLogps
from rlhf_dpo.batch_objective import Relative, RelativeDiagonal, RelativeUnpaired
from rlhf_dpo.objective import DPO, RewardAware

from .conftest import POLICY, REFERENCE, log_sigmoid, sigmoid


def test_relative_diagonal_by_hand():
    """u_c = (1, 3), u_r = (0, 2): own differences 1 and 1, others -1 and 3; w = 1 is DPO."""
    policy = PairLogps(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0]), torch.ones(2), torch.ones(2))
    reference = PairLogps(*torch.zeros(2, 2), torch.ones(2), torch.ones(2))
    losses, _ = RelativeDiagonal(beta=1.0, own_weight=0.75)(policy, reference)
    expected = [-0.75 * log_sigmoid(1) - 0.25 * log_sigmoid(-1), -0.75 * log_sigmoid(1) - 0.25 * log_sigmoid(3)]
    assert losses.tolist() == pytest.approx(expected)
    torch.testing.assert_close(RelativeDiagonal(own_weight=1.0)(policy, reference)[0], DPO()(policy, reference)[0])
    one_prompt = PairContext(prompt_index=torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(RelativeDiagonal()(policy, reference, one_prompt)[0], DPO()(policy, reference)[0])


def test_relative_by_hand():
    """Two pairs, equal prompts: weights 1/2 each; orthogonal prompts, temperature 1: softmax of (1, 0)."""
    policy = PairLogps(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0]), torch.ones(2), torch.ones(2))
    reference = PairLogps(*torch.zeros(2, 2), torch.ones(2), torch.ones(2))
    losses, _ = Relative(beta=1.0)(policy, reference, PairContext(prompt_embedding=torch.ones(2, 3)))
    expected = [
        -(log_sigmoid(0.5 * (1 - 0)) + log_sigmoid(0.5 * (1 - 2))) / 2,
        -(log_sigmoid(0.5 * (3 - 0)) + log_sigmoid(0.5 * (3 - 2))) / 2,
    ]
    assert losses.tolist() == pytest.approx(expected)
    near = math.e / (math.e + 1)
    losses, _ = Relative(beta=1.0, temperature=1.0)(policy, reference, PairContext(prompt_embedding=torch.eye(2) * 7))
    expected = -(log_sigmoid(near * 1) + log_sigmoid((1 - near) * -1)) / 2
    assert losses[0].item() == pytest.approx(expected)


def test_relative_with_one_sharp_temperature_is_dpo(pairs):
    """temperature -> 0 puts all weight on a pair's own prompt; its term is then DPO's, the others log 2."""
    policy, reference = pairs
    embedding = PairContext(prompt_embedding=torch.eye(6))
    losses, _ = Relative(temperature=1e-3)(policy, reference, embedding)
    torch.testing.assert_close(losses, (DPO()(policy, reference)[0] + 5 * math.log(2)) / 6)


def test_relative_unpaired_by_hand():
    """Good u = 1 and 3, bad u = 0, 2 and 1, of any prompts: the mean over six contrasts, weighted by similarity."""
    policy, good = torch.tensor([0.0, 1.0, 2.0, 3.0, 1.0]), torch.tensor([False, True, False, True, False])
    alike = torch.ones(5, 2)
    losses, metrics = RelativeUnpaired(beta=1.0)(policy, torch.zeros(5), good, alike)
    terms = [-log_sigmoid((chosen - rejected) / 3) for chosen in (1, 3) for rejected in (0, 2, 1)]
    assert losses.mean().item() == pytest.approx(sum(terms) / 6)
    assert losses[[1, 3]].sum().item() == pytest.approx(losses[~good].sum().item())  # each side has half of the weight
    assert metrics["accuracy"].mean().item() == pytest.approx((1 + 0 + 0.5 + 1 + 1 + 1) / 6)
    apart = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1], [0, 1]])  # the first good one is near the first bad one
    losses, _ = RelativeUnpaired(beta=1.0, temperature=1.0)(policy, torch.zeros(5), good, apart)
    w = [math.e / (math.e + 2), 1 / (math.e + 2), 1 / (math.e + 2)]
    v = [1 / (1 + 2 * math.e), math.e / (1 + 2 * math.e), math.e / (1 + 2 * math.e)]
    terms = [-log_sigmoid(a * (1 - u)) for a, u in zip(w, (0, 2, 1), strict=True)]
    terms += [-log_sigmoid(a * (3 - u)) for a, u in zip(v, (0, 2, 1), strict=True)]
    assert losses.mean().item() == pytest.approx(sum(terms) / 6)


def test_relative_unpaired_of_pairs_is_relative_paired(pairs):
    """The chosen responses labelled good and the rejected ones bad: the mean of the paired loss."""
    policy, reference = pairs
    embedding = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    paired, _ = Relative()(policy, reference, PairContext(prompt_embedding=embedding))
    good = torch.arange(12) < 6
    both = [torch.cat([x.chosen, x.rejected]) for x in (policy, reference)]
    unpaired, _ = RelativeUnpaired()(*both, good, torch.cat([embedding, embedding]))
    torch.testing.assert_close(unpaired.mean(), paired.mean())


def test_relative_unpaired_without_both_kinds_has_no_gradient():
    policy = torch.ones(3, requires_grad=True)
    losses, _ = RelativeUnpaired()(policy, torch.zeros(3), torch.ones(3).bool(), torch.ones(3, 2))
    losses.sum().backward()
    assert losses.tolist() == [0, 0, 0] and policy.grad.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="embedding"):
        RelativeUnpaired()(policy, torch.zeros(3), torch.ones(3).bool())


@pytest.mark.parametrize("distance", ["squared", "kl_scores_policy", "kl_policy_scores"])
def test_reward_aware_is_zero_exactly_where_gaps_match(distance):
    """beta * delta = 0.5 * 3 = 1.5 = score_scale * (2 - 1.25)."""
    scores = PairContext(torch.tensor([2.0]), torch.tensor([1.25]))
    matching = RewardAware(beta=0.5, score_scale=2.0, distance=distance)
    assert matching(POLICY, REFERENCE, scores)[0].item() == pytest.approx(0.0, abs=1e-12)
    assert replace(matching, score_scale=1.0)(POLICY, REFERENCE, scores)[0].item() > 0.01


def test_reward_aware_by_hand():
    scores = PairContext(torch.tensor([1.0]), torch.tensor([0.0]))
    p, q = sigmoid(1.0), sigmoid(1.5)
    expected = {
        "squared": 0.25,
        "kl_scores_policy": p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)),
        "kl_policy_scores": q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)),
    }
    for distance, value in expected.items():
        assert RewardAware(beta=0.5, distance=distance)(POLICY, REFERENCE, scores)[0].item() == pytest.approx(value)
