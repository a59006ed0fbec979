import math

import pytest
import torch

from rlhf.functional.advantages import gae, shaped_rewards
from rlhf.functional.masking import masked_mean, masked_var
from rlhf.functional.ratio import clipped_surrogate
from rlhf_ppo.objective import PPO, clipped_value_loss


@pytest.mark.parametrize(
    "ratio, advantage, expected",
    [
        (1.0, 2.0, -2.0),
        (1.5, 2.0, -2.4),  # clipped at 1.2: no further gain
        (0.5, 2.0, -1.0),  # a move in the wrong direction is not clipped
        (1.5, -2.0, 3.0),
        (0.5, -2.0, 1.6),  # clipped at 0.8
    ],
)
def test_policy_loss_by_hand(ratio, advantage, expected):
    loss = clipped_surrogate(torch.tensor(math.log(ratio)), torch.tensor(advantage), 0.2, 0.2)
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "value, expected",
    [
        (1.0, 0.5),  # V_old 1, R 2: (1 - 2)^2 / 2
        (1.5, 0.5 * 0.8**2),  # clipped to 1.2: the larger error is used
        (3.0, 0.5 * 1.0),  # (3 - 2)^2 against (1.2 - 2)^2
    ],
)
def test_value_loss_by_hand(value, expected):
    value, old, target = torch.tensor(value), torch.tensor(1.0), torch.tensor(2.0)
    assert clipped_value_loss(value, old, target, 0.2).item() == pytest.approx(expected)
    assert clipped_value_loss(value, old, target, None).item() == pytest.approx(0.5 * (value - 2).item() ** 2)


def rollout(seed=0, rows=4, length=5):
    generator = torch.Generator().manual_seed(seed)
    names = ("logp", "ref_logp", "values", "advantages", "returns", "entropy")
    tensors = dict(zip(names, torch.randn(len(names), rows, length, generator=generator).double(), strict=True))
    tensors["mask"] = torch.arange(length) < torch.tensor([5, 3, 1, 4])[:rows].unsqueeze(1)
    tensors["score"] = torch.randn(rows, generator=generator).double()
    return tensors


def loss_of(objective, r, logp=None, values=None):
    logp = r["logp"] if logp is None else logp
    values = r["values"] if values is None else values
    return objective(logp, r["logp"], r["advantages"], values, r["values"], r["returns"], r["entropy"])


def test_gradient_at_ratio_one_is_reinforce():
    """On the first minibatch d loss / d logp = -advantage: REINFORCE with a baseline."""
    r = rollout()
    logp = r["logp"].clone().requires_grad_()
    losses, metrics = loss_of(PPO(value_coefficient=0.0), r, logp=logp)
    (gradient,) = torch.autograd.grad(losses.sum(), logp)
    torch.testing.assert_close(gradient, -r["advantages"])
    assert metrics["ratio"].eq(1).all() and metrics["approx_kl"].eq(0).all() and metrics["clip_fraction"].eq(0).all()


def test_gradient_vanishes_where_clipped():
    r = rollout()
    r["advantages"] = torch.ones_like(r["advantages"])
    logp = (r["logp"] + 0.5).requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(PPO(value_coefficient=0.0), r, logp=logp)[0].sum(), logp)
    assert gradient.eq(0).all()


def test_loss_terms_add_up():
    r = rollout()
    generator = torch.Generator().manual_seed(3)
    logp = r["logp"] + 0.3 * torch.randn(r["logp"].shape, generator=generator)
    values = r["values"] + 0.3 * torch.randn(r["logp"].shape, generator=generator)
    objective = PPO(value_coefficient=0.3, entropy_coefficient=0.01)
    losses, metrics = loss_of(objective, r, logp, values)
    expected = metrics["policy_loss"] + 0.3 * metrics["value_loss"] - 0.01 * r["entropy"]
    torch.testing.assert_close(losses, expected)
    ratio, advantages = (logp - r["logp"]).exp(), r["advantages"]
    clipped = ((ratio > 1.2) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    assert torch.equal(metrics["clip_fraction"].bool(), clipped)
    leaf = logp.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(PPO(value_coefficient=0.0), r, leaf, values)[0].sum(), leaf)
    assert (
        torch.equal(gradient == 0, clipped) and clipped.any()
    )  # the clip fraction counts the tokens whose gradient the clip removes
    assert torch.equal(metrics["value_clip_fraction"].bool(), (values - r["values"]).abs() > 0.2)
    assert all(value.shape == losses.shape and not value.requires_grad for value in metrics.values())


def test_estimate_whitens_advantages_but_not_returns():
    r = rollout()
    rewards, advantages, returns = PPO().estimate(r["score"], r["logp"], r["ref_logp"], r["values"], r["mask"])
    torch.testing.assert_close(rewards, shaped_rewards(r["score"], r["logp"], r["ref_logp"], r["mask"], 0.05))
    raw, expected_returns = gae(rewards, r["values"], r["mask"], 1.0, 0.95)
    torch.testing.assert_close(returns, expected_returns)
    assert masked_mean(advantages, r["mask"]).item() == pytest.approx(0, abs=1e-7)
    assert masked_var(advantages, r["mask"]).item() == pytest.approx(1, abs=1e-6)
    scale = masked_var(raw, r["mask"]).sqrt()
    torch.testing.assert_close((advantages * scale + masked_mean(raw, r["mask"]))[r["mask"]], raw[r["mask"]])


def test_estimate_uses_the_current_beta():
    r = rollout()
    arguments = [r[name] for name in ("score", "logp", "ref_logp", "values", "mask")]
    torch.testing.assert_close(PPO(beta=0.1).estimate(*arguments), PPO(beta=0.7).estimate(*arguments, beta=0.1))


def test_next_beta_by_hand():
    assert PPO().next_beta(0.05, kl=100.0, n=512) == 0.05
    steered = PPO(kl_target=6.0, kl_horizon=10000)
    assert steered.next_beta(0.05, kl=100.0, n=512) == pytest.approx(0.05 * (1 + 0.2 * 0.0512))
    assert steered.next_beta(0.05, kl=1.0, n=512) < 0.05
    assert steered.next_beta(0.05, kl=100.0, n=128, total=2560) == pytest.approx(0.05 * (1 + 0.2 * 0.0128))


def test_without_a_horizon_beta_adapts_over_a_twentieth_of_the_run():
    """In the default run, 20 rollouts of 128, it can grow 1.2 ^ 20 = 38-fold; with 10000 responses it was 1.053."""
    steered, beta = PPO(kl_target=6.0), 0.05
    for _ in range(20):
        beta = steered.next_beta(beta, kl=100.0, n=128, total=2560)
    assert beta == pytest.approx(0.05 * 1.2**20)
    assert steered.next_beta(0.05, kl=0.0, n=512, total=204800) == pytest.approx(0.05 * (1 - 0.2 * 0.05))


def test_entropy_is_computed_only_when_used():
    r = rollout()
    arguments = (r["logp"], r["logp"], r["advantages"], r["values"], r["values"], r["returns"])
    assert "entropy" not in PPO()(*arguments)[1]
    with pytest.raises(ValueError, match="entropy"):
        PPO(entropy_coefficient=0.1)(*arguments)


def test_shapes_must_agree():
    r = rollout()
    with pytest.raises(ValueError, match="one shape"):
        PPO()(r["logp"], r["logp"], r["advantages"], r["values"][:, :1], r["values"], r["returns"])


def test_a_bandit_is_solved():
    """Three arms with rewards 0, 0, 1 and no KL: a few updates put the probability on the third."""
    torch.manual_seed(0)
    logits = torch.zeros(3, requires_grad=True)
    value = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([logits, value], lr=0.1)
    objective = PPO(beta=0.0)
    for _ in range(30):
        with torch.no_grad():
            old = torch.log_softmax(logits, -1)
            arms = torch.multinomial(old.exp(), 64, replacement=True)
            old_logp, old_values = old[arms].unsqueeze(1), value.expand(64, 1).clone()
            mask = torch.ones(64, 1)
            score = (arms == 2).float()
            _, advantages, returns = objective.estimate(score, old_logp, old_logp, old_values, mask)
        for _ in range(4):
            logp = torch.log_softmax(logits, -1)[arms].unsqueeze(1)
            losses, _ = objective(logp, old_logp, advantages, value.expand(64, 1), old_values, returns)
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
    assert torch.softmax(logits, -1)[2].item() > 0.95
