"""Every objective at extreme inputs, in fp32 and bf16: a finite loss, a finite gradient, and the correct limit."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from rlhf.functional.kl import ESTIMATORS
from rlhf.functional.ratio import LARGEST
from rlhf.objective import (
    ContrastObjective,
    CrossEntropy,
    GroupObjective,
    LabelObjective,
    Objective,
    PairContext,
    PairLogps,
    PairObjective,
    PolicyObjective,
    ScoreObjective,
    TokenObjective,
)
from rlhf_dpo.batch_objective import KTO
from rlhf_dpo.objective import DPO, EXO, IPO, NCA, ORPO, SPPO, APODown, APOZero, DiscoPOP, Hinge, Robust, SimPO
from rlhf_grpo.objective import DAPO, GRPO, GSPO, DrGRPO
from rlhf_ppo.objective import PPO
from rlhf_reward_model.objective import Pairwise
from rlhf_rloo.objective import RLOO

ROOT = Path(__file__).resolve().parents[2]
#: every option of the group, by name, so that a new one is tested too
OPTIONS = {
    path.stem: path for pattern in ("conf", "plugins/*/conf") for path in ROOT.glob(f"{pattern}/objective/*.yaml")
}
MORE: dict[str, Objective] = {
    "dpo smoothed": DPO(label_smoothing=0.1),
    "dpo without reference": DPO(reference_free=True),
    "discopop at a temperature above 1": DiscoPOP(temperature=2.0),
    "ipo on means": IPO(length_normalized=True),
    "pairwise, centred": Pairwise(margin="large", centering=0.01),
    "ppo with every term": PPO(entropy_coefficient=0.01, whiten_rewards=True, kl_estimator="k3"),
    "grpo with the KL in the reward": GRPO(kl_in="reward", drop_zero_spread=True),
    "grpo over the batch": GRPO(scale="batch"),
    "gspo with KL": GSPO(beta=0.1),
    "rloo normalised": RLOO(normalize=True),
}
DTYPES = [torch.float32, torch.bfloat16]
EXTREMES = [0.0, 1e-3, 1.0, 19.0, 21.0, 89.0, 100.0, 900.0, 1e4]
GAPS = torch.tensor([*EXTREMES, *(-x for x in EXTREMES)])
K = 3


def made(name: str) -> Any:
    return MORE[name] if name in MORE else instantiate(OmegaConf.load(OPTIONS[name]))


def pairs(objective: PairObjective, dtype: torch.dtype, length: int) -> tuple[Tensor, list[Tensor]]:
    """Compute losses for all log-ratios of the chosen against all of the rejected."""
    chosen, rejected = (x.flatten().to(dtype) for x in torch.meshgrid(GAPS, GAPS, indexing="ij"))
    lengths = torch.full((len(chosen),), length)
    # Log-probabilities are at most 0: the policy's fall, or the reference's do.
    logp = [x.clamp(max=0.0).requires_grad_() for x in (chosen, rejected)]
    ref = [(p - x).detach() for p, x in zip(logp, (chosen, rejected), strict=True)]
    context = PairContext(chosen, rejected, torch.ones(len(chosen), 2, dtype=dtype))
    losses, _ = objective(PairLogps(*logp, lengths, lengths), PairLogps(*ref, lengths, lengths), context)
    return losses, logp


def tokens(objective: Any, dtype: torch.dtype, length: int, masked: bool) -> tuple[Tensor, list[Tensor]]:
    """Compute losses for each log-ratio to the sampling policy and to the reference, and each sign of the advantage."""
    old_gap, ref_gap, sign = (
        x.flatten().to(dtype) for x in torch.meshgrid(GAPS, GAPS, torch.tensor([1.0, -1.0, 0.0]), indexing="ij")
    )
    rows = len(sign)
    old = torch.where(old_gap > 0, -old_gap, 0.0).to(dtype)
    logp = (old + old_gap).unsqueeze(1).expand(rows, length).clone().requires_grad_()
    old, ref = (x.unsqueeze(1).expand(rows, length).to(dtype) for x in (old, (old + old_gap) - ref_gap))
    mask = torch.zeros(rows, length, dtype=torch.bool) if masked else torch.ones(rows, length, dtype=torch.bool)
    mask[::2, 1:] = False
    scores = sign * 1e4
    if isinstance(objective, PolicyObjective):
        values = (sign.unsqueeze(1) * 1e4).expand(rows, length).clone().requires_grad_()
        _, advantages, returns = objective.estimate(scores, old, ref, values.detach(), mask)
        entropy = torch.zeros_like(old)
        losses, _ = objective(logp, old, advantages.to(dtype), values, values.detach() + 1, returns, entropy)
        weights, total = mask.float(), mask.sum().clamp(min=1e-8)
        leaves = [logp, values]
    else:
        advantages, keep = objective.advantages(scores, old, ref, mask, K)
        losses, _ = objective(logp, old, ref, advantages, mask)
        weights, divisor = objective.weights(mask, 8)
        weights, total = weights * keep.unsqueeze(1), (divisor * keep).sum().clamp(min=1e-8)
        leaves = [logp]
    return (losses * weights).sum() / total, leaves


def outcome(objective: Objective, dtype: torch.dtype, length: int, masked: bool) -> tuple[Tensor, list[Tensor]]:
    """Return the losses of an objective at all extremes, and the tensors to differentiate by."""
    if isinstance(objective, PairObjective):
        return pairs(objective, dtype, 0 if masked else length)
    if isinstance(objective, PolicyObjective | GroupObjective):
        return tokens(objective, dtype, length, masked)
    leaf = GAPS.to(dtype).requires_grad_()
    desirable = torch.zeros(len(GAPS), dtype=torch.bool) if masked else torch.arange(len(GAPS)) % 2 == 0
    if isinstance(objective, ScoreObjective):
        other = GAPS.flip(0).to(dtype).requires_grad_()
        return objective(leaf, other, torch.arange(len(GAPS)) % 5 - 1)[0], [leaf, other]
    if isinstance(objective, LabelObjective):
        z = objective.reference_point(leaf, torch.zeros_like(leaf))
        return objective(leaf, torch.zeros_like(leaf), desirable, z)[0], [leaf]
    if isinstance(objective, ContrastObjective):
        return objective(leaf, torch.zeros_like(leaf), desirable, torch.ones(len(GAPS), 2, dtype=dtype))[0], [leaf]
    assert isinstance(objective, TokenObjective)
    low = (-GAPS.abs()).to(dtype).requires_grad_()
    return objective(low)[0], [low]


@pytest.mark.parametrize("masked", [False, True], ids=["", "all masked"])
@pytest.mark.parametrize("length", [1, 3], ids=["one token", "three tokens"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*OPTIONS, *MORE])
def test_loss_and_gradient_are_finite(name: str, dtype: torch.dtype, length: int, masked: bool) -> None:
    """With everything masked: no tokens, no response of the other kind."""
    losses, leaves = outcome(made(name), dtype, length, masked)
    gradients = torch.autograd.grad(losses.float().sum(), leaves, allow_unused=True)
    assert losses.isfinite().all()
    for gradient in gradients:
        assert gradient is None or gradient.isfinite().all()


# -- limits ---------------------------------------------------------------------------------------------------------

#: loss and slope in beta * delta of pairs whose margin is far above and far below 0 (both log-ratios move alike)
FAR = 1e4
PAIR_LIMITS: dict[str, tuple[PairObjective, tuple[float, float], tuple[float, float]]] = {
    # objective at beta 0.1: (loss, d loss / d u_c) at u_c = +1e4, and at -1e4; u_r = -u_c
    "dpo": (DPO(), (0.0, 0.0), (2000.0, -0.1)),
    "dpo, smoothed": (DPO(label_smoothing=0.1), (200.0, 0.01), (1800.0, -0.09)),
    "robust": (Robust(flip_rate=0.1), (-250.0, -0.0125), (2250.0, -0.1125)),
    "ipo": (IPO(), ((2e4 - 5) ** 2, 2 * (2e4 - 5)), ((2e4 + 5) ** 2, -2 * (2e4 + 5))),
    "hinge": (Hinge(), (0.0, 0.0), (2001.0, -0.1)),
    "simpo": (SimPO(target_margin=0.5), (0.0, 0.0), (4e4 + 0.5, -2.0)),
    "apo_zero": (APOZero(), (0.0, 0.0), (2.0, 0.0)),
    "apo_down": (APODown(), (1.0, 0.0), (1.0, 0.0)),
    "sppo": (SPPO(), (2 * (1e4 - 5) ** 2, 2 * (1e4 - 5)), (2 * (1e4 + 5) ** 2, -2 * (1e4 + 5))),
    "nca": (NCA(), (500.0, 0.05), (1500.0, -0.1)),
    "exo": (EXO(label_smoothing=0.1), (-math.log(0.9), 0.0), (-math.log(0.1), 0.0)),
    "discopop": (DiscoPOP(), (0.0, 0.0), (2000.0, -0.1)),
}


@pytest.mark.parametrize("name", PAIR_LIMITS)
def test_limits_of_pairs(name: str) -> None:
    objective, *expected = PAIR_LIMITS[name]
    for sign, (value, slope) in zip((1.0, -1.0), expected, strict=True):
        chosen = torch.tensor([FAR * sign], requires_grad=True)
        one, zero = torch.ones(1), torch.zeros(1)
        losses, _ = objective(PairLogps(chosen, -FAR * sign * one, one, one), PairLogps(zero, zero, one, one))
        (gradient,) = torch.autograd.grad(losses.sum(), chosen)
        assert losses.item() == pytest.approx(value, abs=1e-6, rel=1e-5)
        assert gradient.item() == pytest.approx(slope, abs=1e-9, rel=1e-5)


def test_discopop_is_finite_at_a_large_negative_margin() -> None:
    """beta * delta = -90: loss 90 and a slope of -0.1 in delta; it was nan."""
    chosen = torch.tensor([-900.0], requires_grad=True)
    one, zero = torch.ones(1), torch.zeros(1)
    losses, _ = DiscoPOP()(PairLogps(chosen, zero, one, one), PairLogps(zero, zero, one, one))
    losses.sum().backward()
    assert losses.item() == pytest.approx(90.0) and chosen.grad.item() == pytest.approx(-0.1)


def test_limits_of_orpo_for_two_equally_unlikely_responses() -> None:
    """log 2 of the odds, and the likelihood; the odds of a small p are p, so their slope is 1."""
    chosen = torch.tensor([-1e4], requires_grad=True)
    one = torch.ones(1)
    losses, _ = ORPO(odds_coefficient=0.1)(PairLogps(chosen, -1e4 * one, one, one))
    losses.sum().backward()
    assert losses.item() == pytest.approx(1e4 + 0.1 * math.log(2)) and chosen.grad.item() == pytest.approx(-1.05)


def test_limits_of_kto() -> None:
    """A response far above z has no loss if it is good and its full weight if it is bad, and neither has a slope."""
    policy, zero = torch.tensor([1e4, 1e4, -1e4, -1e4], requires_grad=True), torch.zeros(4)
    good = torch.tensor([True, False, True, False])
    losses, _ = KTO(desirable_weight=2.0, undesirable_weight=3.0)(policy, zero, good, torch.tensor(0.0))
    losses.sum().backward()
    assert losses.tolist() == [0, 3, 2, 0] and policy.grad.eq(0).all()


CLIPPED = [PPO(value_coefficient=0.0), GRPO(beta=0.0), DrGRPO(), DAPO(), GSPO(), RLOO()]


@pytest.mark.parametrize("objective", CLIPPED, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("gap", [100.0, 1e4])
def test_limits_of_clipped_ratios(objective: Any, gap: float) -> None:
    """Beyond the clip there is no slope; a bad response that became likely has the largest slope downwards."""
    low, high = (getattr(objective, name, getattr(objective, "clip", None)) for name in ("clip_low", "clip_high"))
    cases = [  # log-ratio, advantage, loss, slope
        (gap, 1.0, -(1 + high), 0.0),
        (-gap, -1.0, 1 - low, 0.0),
        (-gap, 1.0, 0.0, 0.0),
        (gap, -1.0, math.exp(LARGEST), math.exp(LARGEST)),
        (gap, 0.0, 0.0, 0.0),
    ]
    for log_ratio, advantage, value, slope in cases:
        logp = torch.full((1, 1), log_ratio, requires_grad=True)
        zero, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
        if isinstance(objective, PPO):
            losses, metrics = objective(logp, zero, zero + advantage, zero, zero, zero)
        else:
            losses, metrics = objective(logp, zero, zero, torch.tensor([advantage]), mask)
        (gradient,) = torch.autograd.grad(losses.sum(), logp)
        assert losses.item() == pytest.approx(value, abs=1e-6, rel=1e-5)
        assert gradient.item() == pytest.approx(slope, abs=1e-6, rel=1e-5)
        assert all(x.isfinite().all() for x in metrics.values())
        assert metrics["clip_fraction"].item() == float(log_ratio * advantage > 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limits_of_the_kl_estimators(dtype: torch.dtype) -> None:
    """k3 grows as the log-ratio where the policy is more certain, and its slope stays finite where the reference is."""
    logp = torch.tensor([1e4, 100.0, -100.0, -1e4], dtype=dtype, requires_grad=True)
    for estimator in ESTIMATORS.values():
        values = estimator(logp, torch.zeros_like(logp))
        (gradient,) = torch.autograd.grad(values.float().sum(), logp)
        assert values.isfinite().all() and gradient.isfinite().all()
    assert values[:2].tolist() == pytest.approx([1e4 - 1, 99.0], rel=0.01)  # k3 is the last
    assert gradient[:2].tolist() == pytest.approx([1.0, 1.0]) and (gradient[2:] < -1e8).all()


@pytest.mark.parametrize("objective", [GRPO(), GRPO(scale="batch"), DrGRPO(), DAPO(), GSPO(), RLOO()], ids=repr)
def test_equal_rewards_have_zero_advantages(objective: Any) -> None:
    logp, mask = torch.zeros(6, 2), torch.ones(6, 2, dtype=torch.bool)
    advantages, keep = objective.advantages(torch.full((6,), 0.1), logp, logp, mask, K)
    assert advantages.abs().max() < 1e-3
    assert keep.any() != getattr(objective, "drop_zero_spread", False)


def test_cross_entropy_is_minus_the_log_probability() -> None:
    low = torch.tensor([-1e4, 0.0], requires_grad=True)
    losses, _ = CrossEntropy()(low)
    losses.sum().backward()
    assert losses.tolist() == [1e4, 0] and low.grad.tolist() == [-1, -1]


def test_limits_of_the_ranking_loss() -> None:
    gap = torch.tensor([1e4, -1e4], requires_grad=True)
    losses, _ = Pairwise()(gap, torch.zeros(2), torch.zeros(2, dtype=torch.long))
    losses.sum().backward()
    assert losses.tolist() == [0, 1e4] and gap.grad.tolist() == [0, -1]
