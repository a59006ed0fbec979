"""Losses on pairs and labels: numbers computed by hand, and properties of their gradients."""

import math
from dataclasses import replace

import pytest
import torch

from rlhf.objective import ContrastObjective, LabelObjective, Objective, PairContext, PairLogps, PairObjective
from rlhf_dpo import batch_objective
from rlhf_dpo import objective as pair_objective
from rlhf_dpo.batch_objective import KTO, Relative, RelativeDiagonal, RelativeUnpaired
from rlhf_dpo.objective import (
    DPO,
    DPONLL,
    EXO,
    IPO,
    NCA,
    ORPO,
    SPPO,
    APODown,
    APOZero,
    DiscoPOP,
    DPONorm,
    Hinge,
    RewardAware,
    Robust,
    SimPO,
)

from .conftest import POLICY, REFERENCE, log_sigmoid, one, sigmoid


@pytest.mark.parametrize(
    "objective, expected",
    [
        (DPO(beta=0.5), -log_sigmoid(1.5)),
        (DPO(beta=0.5, label_smoothing=0.1), -0.9 * log_sigmoid(1.5) - 0.1 * log_sigmoid(-1.5)),
        (DPO(beta=0.5, reference_free=True), -log_sigmoid(1.0)),  # -4 + 6 = 2
        (DPONLL(beta=0.5, nll_coefficient=0.2), -log_sigmoid(1.5) + 0.2 * 1.0),  # 4 nats over 4 tokens
        (DPONorm(beta=5.0), -log_sigmoid(5.0)),
        (Robust(beta=0.5, flip_rate=0.1), (-0.9 * log_sigmoid(1.5) + 0.1 * log_sigmoid(-1.5)) / 0.8),
        (IPO(beta=0.5), 4.0),  # (3 - 1)^2
        (IPO(beta=0.25, length_normalized=True), 1.0),  # (1 - 2)^2
        (Hinge(beta=0.25), 0.25),
        (Hinge(beta=1.0), 0.0),
        (SimPO(beta=2.0, target_margin=0.5), -log_sigmoid(2 * (-1.0 + 3.0) - 0.5)),
        (APOZero(beta=0.5), sigmoid(-1.0) + sigmoid(-0.5)),
        (APODown(beta=0.5), sigmoid(1.0) + sigmoid(-1.5)),
        (SPPO(beta=0.5), 1.0 + 0.0),  # (2 - 1)^2 + (-1 + 1)^2
        (NCA(beta=0.5), -log_sigmoid(1.0) - 0.5 * (log_sigmoid(-1.0) + log_sigmoid(0.5))),
        (
            EXO(beta=0.5, label_smoothing=0.1),
            sigmoid(1.5) * math.log(sigmoid(1.5) / 0.9) + sigmoid(-1.5) * math.log(sigmoid(-1.5) / 0.1),
        ),
        (
            DiscoPOP(beta=0.1, temperature=0.3),  # margin 0.3, weight sigmoid(1)
            (1 - sigmoid(1.0)) * -log_sigmoid(0.3) + sigmoid(1.0) * math.exp(-0.3),
        ),
        (
            ORPO(odds_coefficient=0.5),  # p = e^-1 and e^-3; odds e^-1 / (1 - e^-1)
            1.0 - 0.5 * log_sigmoid(-1 - math.log(1 - math.exp(-1)) + 3 + math.log(1 - math.exp(-3))),
        ),
    ],
    ids=lambda value: repr(value) if isinstance(value, PairObjective) else "",
)
def test_losses_by_hand(objective, expected):
    losses, metrics = objective(POLICY, REFERENCE if objective.needs_reference else None)
    assert losses.item() == pytest.approx(expected, rel=1e-12)
    assert metrics["accuracy"].item() == 1.0


AGREE = {
    DPO(): math.log(2),
    DPO(label_smoothing=0.2): math.log(2),
    DPONorm(): math.log(2),
    Robust(): math.log(2),
    Hinge(): 1.0,
    IPO(beta=0.5): 1.0,
    IPO(beta=0.5, length_normalized=True): 1.0,
    APOZero(): 1.0,
    APODown(): 1.0,
    SPPO(beta=0.5): 2.0,
    NCA(): 2 * math.log(2),
}


@pytest.mark.parametrize("objective", AGREE, ids=repr)
def test_value_before_training(objective, pairs):
    """Where policy and reference agree the loss is a known constant: log 2 for DPO, on every pair."""
    _, reference = pairs
    losses, metrics = objective(reference, reference)
    torch.testing.assert_close(losses, torch.full_like(losses, AGREE[objective]))
    assert metrics["accuracy"].eq(0.5).all() and metrics["reward_margin"].eq(0).all()


ALL = [
    DPO(),
    DPO(label_smoothing=0.1),
    DPO(reference_free=True),
    DPONLL(),
    DPONorm(),
    Robust(),
    IPO(),
    IPO(length_normalized=True),
    Hinge(),
    SimPO(),
    ORPO(),
    APOZero(),
    SPPO(),
    NCA(),
    EXO(),
    DiscoPOP(),
    Relative(),
    RelativeDiagonal(),
    RewardAware(score_scale=5.0),
]


def context_for(objective, count):
    generator = torch.Generator().manual_seed(1)
    return PairContext(
        chosen_score=torch.ones(count) * 3 if objective.needs_scores else None,
        rejected_score=torch.zeros(count) if objective.needs_scores else None,
        prompt_embedding=torch.randn(count, 4, generator=generator) if objective.needs_prompt_embedding else None,
    )


def test_every_loss_is_tested():
    classes = {x for module in (pair_objective, batch_objective) for x in vars(module).values() if isinstance(x, type)}
    losses = {c for c in classes if issubclass(c, Objective)} - {PairObjective, LabelObjective, ContrastObjective}
    assert losses == {type(one) for one in ALL} | {APODown, KTO, RelativeUnpaired}


@pytest.mark.parametrize("objective", [loss for loss in ALL if not isinstance(loss, DiscoPOP)], ids=repr)
def test_gradient_raises_chosen_and_lowers_rejected(objective, pairs):
    """At the start of training every loss but apo_down and discopop raises the chosen and lowers the rejected."""
    _, reference = pairs
    policy = replace(reference, chosen=reference.chosen.clone().requires_grad_())
    policy = replace(policy, rejected=reference.rejected.clone().requires_grad_())
    losses, _ = objective(policy, reference, context_for(objective, 6))
    chosen, rejected = torch.autograd.grad(losses.sum(), [policy.chosen, policy.rejected])
    assert chosen.lt(0).all() and rejected.gt(0).all()


def test_apo_down_lowers_chosen_and_rejected(pairs):
    _, reference = pairs
    policy = replace(reference, chosen=reference.chosen.clone().requires_grad_())
    policy = replace(policy, rejected=reference.rejected.clone().requires_grad_())
    losses, _ = APODown()(policy, reference)
    chosen, rejected = torch.autograd.grad(losses.sum(), [policy.chosen, policy.rejected])
    # d/du_c: beta (1/4 - 1/4) = 0 at the start, d/du_r: beta / 4
    torch.testing.assert_close(chosen, torch.zeros_like(chosen))
    torch.testing.assert_close(rejected, torch.full_like(rejected, 0.025))


def test_discopop_starts_by_shrinking_the_margin(pairs):
    """Slope in delta at 0: beta * [w' (1 - log 2) - 1/4 - 1/2] with w' = 1 / (4 temperature) = 5."""
    _, reference = pairs
    chosen = reference.chosen.clone().requires_grad_()
    losses, _ = DiscoPOP()(replace(reference, chosen=chosen), reference)
    (gradient,) = torch.autograd.grad(losses.sum(), chosen)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 0.1 * (5 * (1 - math.log(2)) - 0.75)))


def test_the_dpo_gradient_is_equation_7(pairs):
    """Rafailov et al.: the gradient in u_c is -beta * sigmoid(-beta * delta), and its negative in u_r."""
    policy, reference = pairs
    losses, _ = DPO(beta=0.3)(policy, reference)
    chosen, rejected = torch.autograd.grad(losses.sum(), [policy.chosen, policy.rejected])
    delta = (policy.chosen - reference.chosen - policy.rejected + reference.rejected).detach()
    torch.testing.assert_close(chosen, -0.3 * torch.sigmoid(-0.3 * delta))
    torch.testing.assert_close(rejected, -chosen)


def test_robust_is_unbiased_under_flips(pairs):
    """The mean over labels flipped with probability e equals the clean DPO loss, as the paper proves."""
    policy, reference = pairs
    rate = 0.2
    swap = [PairLogps(p.rejected, p.chosen, p.rejected_length, p.chosen_length) for p in (policy, reference)]
    clean = DPO()(policy, reference)[0]
    robust = Robust(flip_rate=rate)
    torch.testing.assert_close((1 - rate) * robust(policy, reference)[0] + rate * robust(*swap)[0], clean)


def test_special_cases_of_losses_agree(pairs):
    """Special cases in which two losses are equal."""
    policy, reference = pairs
    dpo = DPO()(policy, reference)[0]
    torch.testing.assert_close(Robust(flip_rate=0.0)(policy, reference)[0], dpo)
    torch.testing.assert_close(DPONLL(nll_coefficient=0.0)(policy, reference)[0], dpo)
    same_length = torch.full((6,), 4)
    lengths = {"chosen_length": same_length, "rejected_length": same_length}
    even, even_reference = replace(policy, **lengths), replace(reference, **lengths)
    torch.testing.assert_close(DPONorm(beta=0.4)(even, even_reference)[0], DPO(beta=0.1)(even, even_reference)[0])
    no_margin = SimPO(beta=0.4, target_margin=0.0)
    torch.testing.assert_close(no_margin(even)[0], DPO(beta=0.1, reference_free=True)(even)[0])
    assert DPO(beta=1e-9)(policy, reference)[0].tolist() == pytest.approx([math.log(2)] * 6)


def test_losses_are_per_pair(pairs):
    """Row i depends on pair i alone (except in relative PO, which compares all pairs)."""
    policy, reference = pairs
    take = [PairLogps(*(getattr(p, f)[2:4] for f in PairLogps.__dataclass_fields__)) for p in (policy, reference)]
    for objective in ALL:
        if objective.couples_pairs:
            continue
        whole = objective(policy, reference, context_for(objective, 6))[0]
        torch.testing.assert_close(objective(*take, context_for(objective, 2))[0], whole[2:4])


@pytest.mark.parametrize("objective", [*ALL, APODown()], ids=repr)
def test_metrics_are_detached_and_per_pair(objective, pairs):
    losses, metrics = objective(*pairs, context_for(objective, 6))
    assert losses.shape == (6,) and losses.requires_grad
    assert {"accuracy", "reward_margin", "chosen_reward", "rejected_reward"} <= metrics.keys()
    assert all(value.shape == (6,) and not value.requires_grad for value in metrics.values())


def test_extreme_log_ratios_stay_finite():
    policy = one(-1e4, -1e-3)
    policy = replace(policy, chosen=policy.chosen.float().requires_grad_(), rejected=policy.rejected.float())
    reference = one(-1e-3, -1e4)
    reference = replace(reference, chosen=reference.chosen.float(), rejected=reference.rejected.float())
    for objective in [DPO(), DPO(label_smoothing=0.1), Robust(), IPO(), Hinge(), SimPO(), ORPO(), APOZero(), EXO()]:
        losses, _ = objective(policy, reference)
        (gradient,) = torch.autograd.grad(losses.sum(), policy.chosen)
        assert losses.isfinite().all() and gradient.isfinite().all(), objective


def test_orpo_at_probability_one():
    """Log odds are infinite at p = 1; loss and gradient stay finite."""
    policy = one(0.0, -1.0)
    policy.chosen.requires_grad_()
    losses, _ = ORPO()(policy)
    losses.sum().backward()
    assert losses.isfinite().all() and policy.chosen.grad.isfinite().all()


def test_the_two_gammas_of_simpo(pairs):
    """The margin is outside beta in the paper and TRL; SimPO's code has gamma / beta, inside."""
    policy, _ = pairs
    ratio, beta = 0.3, 2.5
    inside = -torch.nn.functional.logsigmoid(beta * (policy.chosen_mean - policy.rejected_mean - ratio))
    torch.testing.assert_close(SimPO(beta=beta, target_margin=beta * ratio)(policy)[0], inside)


def test_kto_by_hand():
    """u = 2 (desirable), 1 (undesirable), z = 0.5, beta 1: 1 - sigmoid(1.5), 2 * (1 - sigmoid(-0.5))."""
    policy, reference = torch.tensor([-1.0, -1.0]), torch.tensor([-3.0, -2.0])
    losses, metrics = KTO(beta=1.0, undesirable_weight=2.0)(
        policy, reference, torch.tensor([True, False]), torch.tensor(0.5)
    )
    assert losses.tolist() == pytest.approx([1 - sigmoid(1.5), 2 * (1 - sigmoid(-0.5))])
    assert metrics["accuracy"].tolist() == [1.0, 0.0]
    assert metrics["reward"].tolist() == [2.0, 1.0]


def test_kto_reference_point_is_clamped_and_has_no_gradient():
    policy = torch.tensor([-1.0, -2.0], requires_grad=True)
    z = KTO.reference_point(policy, torch.tensor([-2.0, -2.0]))
    assert z.item() == 0.5 and not z.requires_grad
    assert KTO.reference_point(policy, torch.zeros(2)).item() == 0.0


def test_kto_gradient():
    policy = torch.zeros(2, requires_grad=True)
    losses, _ = KTO()(policy, torch.zeros(2), torch.tensor([True, False]), torch.tensor(0.0))
    losses.sum().backward()
    assert policy.grad.tolist() == pytest.approx([-0.025, 0.025])  # beta / 4


def test_losses_declare_the_inputs_they_need():
    assert DPO().needs_reference and not DPO(reference_free=True).needs_reference
    assert not SimPO().needs_reference and not ORPO().needs_reference
    assert RewardAware().needs_scores and not DPO().needs_scores
    assert Relative().needs_prompt_embedding


def test_invalid_inputs_are_refused(pairs):
    policy, reference = pairs
    with pytest.raises(ValueError, match="reference"):
        DPO()(policy)
    with pytest.raises(ValueError, match="score"):
        RewardAware()(policy, reference)
    with pytest.raises(ValueError, match="embedding"):
        Relative()(policy, reference)
    with pytest.raises(ValueError, match="one shape"):
        DPO()(policy, PairLogps(*(getattr(reference, f)[:3] for f in PairLogps.__dataclass_fields__)))
    with pytest.raises(ValueError, match=r"chosen \(2,\), rejected \(2, 1\)"):
        PairLogps(torch.zeros(2), torch.zeros(2, 1), torch.ones(2), torch.ones(2))
