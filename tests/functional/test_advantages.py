import pytest
import torch

from rlhf.functional.advantages import explained_variance, gae, sequence_kl, shaped_rewards


def batch(rows=5, length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, length, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([7, 3, 1, 0, 5])[:rows]
    return rewards, values, torch.arange(length) < lengths.unsqueeze(1), lengths


def test_gae_by_hand():
    """One row, discount 0.5, lambda 0.5, rewards 1 2, values 4 2 (then padding that must not be read).

    delta_1 = 2 - 2 = 0, A_1 = 0; delta_0 = 1 + 0.5 * 2 - 4 = -2, A_0 = -2 + 0.25 * 0 = -2; returns 2, 2.
    """
    rewards = torch.tensor([[1.0, 2.0, 100.0]])
    values = torch.tensor([[4.0, 2.0, 100.0]])
    advantages, returns = gae(rewards, values, torch.tensor([[1, 1, 0]]), 0.5, 0.5)
    assert advantages.tolist() == [[-2.0, 0.0, 0.0]]
    assert returns.tolist() == [[2.0, 2.0, 0.0]]


@pytest.mark.parametrize("discount, gae_lambda", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_sum_of_equation_16(discount, gae_lambda):
    """A_t = sum_l (discount * lambda)^l delta_{t+l}, computed row by row."""
    rewards, values, mask, lengths = batch()
    advantages, returns = gae(rewards, values, mask, discount, gae_lambda)
    for row, length in enumerate(lengths.tolist()):
        v = [*values[row, :length].tolist(), 0.0]
        deltas = [rewards[row, t].item() + discount * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((discount * gae_lambda) ** (k - t) * deltas[k] for k in range(t, length))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(expected + v[t], abs=1e-12)
    assert advantages[~mask].eq(0).all() and returns[~mask].eq(0).all()


def test_lambda_one_is_monte_carlo_and_lambda_zero_is_one_step():
    rewards, values, mask, _ = batch()
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, to_go)
    advantages, _ = gae(rewards, values, mask, 1.0, 0.0)
    next_values = torch.cat([(values * mask)[:, 1:], torch.zeros(5, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(advantages, (rewards + next_values - values) * mask)


def test_exact_values_give_zero_advantages():
    """With V the true reward-to-go every temporal difference is 0, whatever lambda is."""
    rewards, _, mask, _ = batch()
    values = (rewards * mask).flip(1).cumsum(1).flip(1)
    advantages, _ = gae(rewards, values, mask, 1.0, 0.7)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages))


def test_gae_does_not_read_padding():
    rewards, values, mask, _ = batch()
    expected = gae(rewards, values, mask, 1.0, 0.95)
    poisoned = gae(rewards.masked_fill(~mask, float("nan")), values.masked_fill(~mask, float("inf")), mask, 1.0, 0.95)
    for a, b in zip(expected, poisoned, strict=True):
        assert torch.equal(a, b)
    wider = [torch.nn.functional.pad(x, (0, 3)) for x in (rewards, values, mask)]
    assert torch.equal(gae(*wider, 1.0, 0.95)[0][:, :7], expected[0])


def test_gae_of_no_tokens():
    empty = torch.zeros(2, 0)
    advantages, returns = gae(empty, empty, empty, 1.0, 0.95)
    assert advantages.shape == returns.shape == (2, 0)


def test_shaped_rewards_by_hand():
    """beta 0.5: penalties -0.5 * (logp - ref); the score is added to the last real token, 1 of row 0, 2 of row 1."""
    logp = torch.tensor([[-1.0, -2.0, 7.0], [-1.0, -1.0, -1.0]])
    ref = torch.tensor([[-2.0, -1.0, 9.0], [-1.0, -3.0, -1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    rewards = shaped_rewards(torch.tensor([10.0, 20.0]), logp, ref, mask, beta=0.5)
    assert rewards.tolist() == [[-0.5, 10.5, 0.0], [0.0, -1.0, 20.0]]


def test_shaped_rewards_sum_to_score_minus_beta_kl():
    logp, ref, mask, _ = batch()
    score = torch.arange(5.0, dtype=torch.float64)
    rewards = shaped_rewards(score, logp, ref, mask, beta=0.3)
    expected = score - 0.3 * sequence_kl(logp, ref, mask)
    expected[3] = 0  # the row without tokens has no reward
    torch.testing.assert_close(rewards.sum(1), expected)
    assert rewards[~mask].eq(0).all()


def test_explained_variance():
    returns = torch.tensor([[1.0, 2.0, 3.0, 99.0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    assert explained_variance(returns, returns, mask).item() == 1.0
    assert explained_variance(torch.full_like(returns, 5.0), returns, mask).item() == pytest.approx(0.0, abs=1e-6)
    assert explained_variance(-returns, returns, mask).item() == pytest.approx(-3.0, abs=1e-6)  # var(2R) = 4 var(R)
