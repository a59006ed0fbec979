"""GRPO, its variants and RLOO: by hand, against TRL, and their gradients."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from rlhf.errors import UserError
from rlhf.functional.groups import group_advantages, has_spread, leave_one_out, length_weights
from rlhf.functional.ratio import clipped_surrogate
from rlhf_grpo.objective import DAPO, GRPO, GSPO, DrGRPO
from rlhf_rloo.objective import RLOO

K, ROWS, LENGTH, LONGEST = 3, 6, 5, 8


def rollout(seed=0):
    """Return log-probabilities (a leaf), those of the sampler and the reference, scores and mask of two groups."""
    generator = torch.Generator().manual_seed(seed)
    logp = -2 * torch.rand(ROWS, LENGTH, generator=generator, dtype=torch.float64)
    old = logp + 0.3 * torch.randn(ROWS, LENGTH, generator=generator, dtype=torch.float64)
    ref = logp + 0.3 * torch.randn(ROWS, LENGTH, generator=generator, dtype=torch.float64)
    scores = torch.randn(ROWS, generator=generator, dtype=torch.float64)
    mask = torch.arange(LENGTH) < torch.tensor([5, 3, 1, 4, 2, 5]).unsqueeze(1)
    return logp.detach().requires_grad_(), old, ref, scores, mask


def loss_of(objective, logp, old, ref, scores, mask, advantages=None):
    """Return the loss as the stage reduces it."""
    computed, keep = objective.advantages(scores, old, ref, mask, K)
    losses, _ = objective(logp, old, ref, computed if advantages is None else advantages, mask)
    weights, divisor = objective.weights(mask, LONGEST)
    return (losses * weights * keep.unsqueeze(1)).sum() / (divisor * keep).sum()


def test_advantages_by_hand():
    scores = torch.tensor([1.0, 0.0, 0.5, 2.0, 2.0, 2.0])
    std = 0.5  # unbiased, of (1, 0, 0.5)
    expected = torch.tensor([0.5, -0.5, 0.0]) / (std + 1e-4)
    torch.testing.assert_close(group_advantages(scores, 3)[:3], expected)
    assert group_advantages(scores, 3)[3:].tolist() == [0, 0, 0]
    assert group_advantages(scores, 3, "none")[:3].tolist() == [0.5, -0.5, 0.0]
    over_batch = torch.tensor([0.5, -0.5, 0]) / (scores.std() + 1e-4)
    torch.testing.assert_close(group_advantages(scores, 3, "batch")[:3], over_batch)
    assert leave_one_out(scores, 3)[:3].tolist() == [0.75, -0.75, 0.0]  # 1 - (0 + 0.5) / 2
    assert has_spread(scores, 3).tolist() == [True] * 3 + [False] * 3
    for bad in (1, 4):
        with pytest.raises(ValueError, match="groups"):
            leave_one_out(scores, bad)


@pytest.mark.parametrize(
    "ratio, advantage, expected",
    [(1.0, 2.0, -2.0), (1.5, 2.0, -2.6), (0.5, 2.0, -1.0), (1.5, -2.0, 3.0), (0.5, -2.0, 1.6), (1.25, 2.0, -2.5)],
)
def test_two_clips_by_hand(ratio, advantage, expected):
    """Clipped at 1.3 above and 0.8 below."""
    loss = clipped_surrogate(torch.tensor(math.log(ratio)), torch.tensor(advantage), low=0.2, high=0.3)
    assert loss.item() == pytest.approx(expected)


def test_the_three_length_normalisations_by_hand():
    """Two responses of 1 and 3 tokens with losses of 4 and 1 per token."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]]).bool()
    losses = torch.tensor([[4.0, 99, 99], [1, 1, 1]])

    def mean(kind):
        weights, divisor = length_weights(mask, kind, longest=10)
        return ((losses * weights).sum() / divisor.sum()).item()

    assert mean("token") == pytest.approx(7 / 4)
    assert mean("sequence") == pytest.approx((4 + 1) / 2)
    assert mean("constant") == pytest.approx(7 / 20)


class Accelerator:
    """Accelerator stand-in of one process."""

    num_processes = 1
    gather = gather_for_metrics = staticmethod(lambda x: x)
    reduce = staticmethod(lambda x, reduction: x)


def stand_in(logp, **fields):
    """Return the trainer attributes that TRL's loss reads."""
    zeros = torch.zeros_like(logp).detach()
    args = SimpleNamespace(use_bias_correction_kl=False, delta=None)
    return SimpleNamespace(
        aux_loss_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, zeros, None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        args=args,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        use_adaptive_entropy=False,
        model=SimpleNamespace(training=True),
        accelerator=Accelerator(),
        current_gradient_accumulation_steps=1,
        max_completion_length=LONGEST,
        _metrics=defaultdict(lambda: defaultdict(list)),
        **fields,
    )


def inputs(old, ref, mask, advantages):
    one = torch.ones(ROWS, 1, dtype=torch.long)
    return {
        "prompt_ids": one,
        "prompt_mask": one,
        "completion_ids": torch.ones(ROWS, LENGTH, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
        "old_logps": (old * mask).sum(1),
    }


def trl_grpo_advantages(scores, scale):
    """Compute TRL's lines (grpo_trainer.py, `_generate_and_score_completions`) from inside a method that generates."""
    from trl.trainer.utils import nanstd

    mean = scores.view(-1, K).nanmean(1).repeat_interleave(K)
    std = nanstd(scores.view(-1, K), dim=1).repeat_interleave(K) if scale != "batch" else nanstd(scores)
    return (scores - mean) / (std + 1e-4) if scale != "none" else scores - mean


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_those_of_trl(scale):
    pytest.importorskip("trl")
    scores = rollout()[3]
    expected = trl_grpo_advantages(scores, scale)
    torch.testing.assert_close(group_advantages(scores, K, scale), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "objective, loss_type",
    [
        (GRPO(beta=0.1), "grpo"),
        (GRPO(beta=0.0, clip_low=0.1, clip_high=0.3, scale="batch"), "grpo"),
        (DrGRPO(), "dr_grpo"),
        (DrGRPO(beta=0.1), "dr_grpo"),
        (DAPO(), "dapo"),
        (DAPO(beta=0.1), "dapo"),
        (GSPO(clip_low=0.1, clip_high=0.2), "grpo"),
        (GSPO(beta=0.1, clip_low=0.1, clip_high=0.2), "grpo"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_grpo_loss_equals_that_of_trl(objective, loss_type):
    pytest.importorskip("trl")
    from trl.trainer.grpo_trainer import GRPOTrainer

    logp, old, ref, scores, mask = rollout()
    advantages = trl_grpo_advantages(scores, objective.scale)
    trainer = stand_in(
        logp,
        loss_type=loss_type,
        importance_sampling_level=objective.importance,
        beta=objective.beta,
        epsilon_low=objective.clip_low,
        epsilon_high=objective.clip_high,
    )
    batch = inputs(old, ref, mask, advantages)
    trainer.args.steps_per_generation = 1
    expected = GRPOTrainer._compute_loss(trainer, None, batch)
    ours = loss_of(objective, logp, old, ref, scores, mask)
    assert ours.item() == pytest.approx(expected.item(), abs=1e-6)
    made, wanted = (torch.autograd.grad(loss, logp)[0] for loss in (ours, expected))
    torch.testing.assert_close(made, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "objective",
    [
        GRPO(beta=0.1, sampler_correction="token_truncate", correction_max=1.2),
        GRPO(beta=0.1, sampler_correction="sequence_mask", correction_max=1.5),
        GSPO(beta=0.1, clip_low=0.1, clip_high=0.2, sampler_correction="sequence_truncate", correction_max=1.5),
    ],
    ids=lambda objective: f"{type(objective).__name__} {objective.sampler_correction}",
)
def test_the_sampler_correction_equals_that_of_trl(objective):
    """It multiplies the policy-gradient term and not the KL."""
    pytest.importorskip("trl")
    from trl.trainer.grpo_trainer import GRPOTrainer

    logp, old, ref, scores, mask = rollout()
    sampler = rollout(seed=1)[1]
    found = objective.sampler_weights(old, sampler, mask)
    advantages = trl_grpo_advantages(scores, objective.scale)
    trainer = stand_in(
        logp,
        loss_type="grpo",
        importance_sampling_level=objective.importance,
        beta=objective.beta,
        epsilon_low=objective.clip_low,
        epsilon_high=objective.clip_high,
        vllm_importance_sampling_correction=True,
    )
    trainer.use_vllm = True
    trainer.args.steps_per_generation = 1
    batch = inputs(old, ref, mask, advantages) | {"importance_sampling_ratio": found[0]}
    expected = GRPOTrainer._compute_loss(trainer, None, batch)
    losses, _ = objective(logp, old, ref, advantages, mask, sampler_weights=found[0])
    weights, divisor = objective.weights(mask, LONGEST)
    ours = (losses * weights).sum() / divisor.sum()
    assert ours.item() == pytest.approx(expected.item(), abs=1e-6)
    assert ours.item() != pytest.approx(loss_of(objective, logp, old, ref, scores, mask).item(), abs=1e-3)
    made, wanted = (torch.autograd.grad(loss, logp)[0] for loss in (ours, expected))
    torch.testing.assert_close(made, wanted, atol=1e-6, rtol=0)


def test_the_sampler_correction_of_rloo_is_of_whole_responses():
    """The gradient of a response is multiplied by the product of its tokens' ratios."""
    logp, old, ref, scores, mask = rollout()
    objective = RLOO(beta=0.0, clip_low=1.0, clip_high=9.0, sampler_correction="sequence_truncate", correction_max=None,
                     correction_min=1e-3)  # fmt: skip
    found = objective.sampler_weights(old, old - 0.1, mask)
    advantages = objective.advantages(scores, old, ref, mask, K)[0]
    plain = torch.autograd.grad(objective(logp, old, ref, advantages, mask)[0].sum(), logp)[0]
    losses, _ = objective(logp, old, ref, advantages, mask, sampler_weights=found[0])
    product = torch.exp(0.1 * mask.sum(1, keepdim=True))
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), logp)[0], plain * product)


@pytest.mark.parametrize("kind", [GRPO, RLOO])
def test_corrections_without_a_range_are_refused(kind):
    with pytest.raises(
        UserError, match=r"objective\.sampler_correction=sequence_truncate: .*objective\.correction_max=3"
    ):
        kind(sampler_correction="sequence_truncate", correction_max=None)
    with pytest.raises(UserError, match=r"objective\.correction_min=2: must be below objective\.correction_max=2"):
        kind(sampler_correction="sequence_mask", correction_min=2, correction_max=2)


@pytest.mark.parametrize("normalize", [False, True])
def test_rloo_loss_equals_that_of_trl(normalize):
    pytest.importorskip("trl")
    from trl.trainer.rloo_trainer import RLOOTrainer
    from trl.trainer.utils import nanstd

    logp, old, ref, scores, mask = rollout()
    objective = RLOO(beta=0.1, clip_low=0.2, clip_high=0.4, normalize=normalize)
    # TRL's lines (rloo_trainer.py, `_generate_and_score_completions`)
    rewards = scores - 0.1 * ((old - ref) * mask).sum(-1)
    groups = rewards.view(-1, K)
    advantages = rewards - ((groups.sum(1, keepdim=True) - groups) / (K - 1)).view(-1)
    if normalize:
        advantages = (advantages - advantages.nanmean()) / (nanstd(advantages) + 1e-4)
    torch.testing.assert_close(objective.advantages(scores, old, ref, mask, K)[0], advantages, atol=1e-6, rtol=0)
    trainer = stand_in(logp, epsilon_low=0.2, epsilon_high=0.4)
    expected = RLOOTrainer._compute_loss(trainer, None, inputs(old, ref, mask, advantages))
    ours = loss_of(objective, logp, old, ref, scores, mask)
    assert ours.item() == pytest.approx(expected.item(), abs=1e-6)
    made, wanted = (torch.autograd.grad(loss, logp)[0] for loss in (ours, expected))
    torch.testing.assert_close(made, wanted, atol=1e-6, rtol=0)


def test_every_group_loss_is_reinforce_on_policy():
    """At ratio 1 and without KL, d loss / d logp = -A times the weight of the token."""
    _, old, ref, scores, mask = rollout()
    for objective in (GRPO(beta=0.0), DrGRPO(), DAPO(), RLOO(beta=0.0)):
        logp = old.clone().requires_grad_()
        loss_of(objective, logp, old, ref, scores, mask).backward()
        advantages, _ = objective.advantages(scores, old, ref, mask, K)
        weights, divisor = objective.weights(mask, LONGEST)
        expected = -advantages.unsqueeze(1) * weights / divisor.sum()
        if isinstance(objective, RLOO):  # the gradient in a whole response's log-probability: equal at all its tokens
            expected = -advantages.unsqueeze(1) * mask / ROWS
        torch.testing.assert_close(logp.grad, expected, atol=1e-7, rtol=0)


def test_kl_in_the_reward_is_subtracted_before_groups_are_compared():
    logp, old, ref, scores, mask = rollout()
    kl = ((old - ref) * mask).sum(1)
    advantages, _ = GRPO(beta=0.3, kl_in="reward").advantages(scores, old, ref, mask, K)
    centred = kl - kl.view(2, K).mean(1).repeat_interleave(K)
    torch.testing.assert_close(advantages, group_advantages(scores, K) - 0.3 * centred)
    unscaled, _ = GRPO(beta=0.3, kl_in="reward", scale="none").advantages(scores, old, ref, mask, K)
    torch.testing.assert_close(unscaled, group_advantages(scores - 0.3 * kl, K, "none"))
    with_kl, _ = GRPO(beta=0.3, kl_in="reward")(logp, old, ref, advantages, mask)
    without, _ = GRPO(beta=0.0)(logp, old, ref, advantages, mask)
    assert torch.equal(with_kl, without)  # and is not in the loss a second time


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_kl_noise_is_not_scaled_to_advantages_of_one(scale):
    """All rewards 1, beta 0.01, KLs of 0.3, 0.1 and -0.1 nats: advantages of -0.002, 0 and 0.002, not of 1."""
    ref = torch.zeros(3, 2, dtype=torch.float64)
    logp = torch.tensor([[0.2, 0.1], [0.1, 9.0], [-0.1, 9.0]], dtype=torch.float64)  # 9: masked
    mask = torch.tensor([[1, 1], [1, 0], [1, 0]]).bool()
    expected = torch.tensor([-0.002, 0.0, 0.002], dtype=torch.float64)
    scores = torch.ones(3, dtype=torch.float64)
    made, keep = GRPO(beta=0.01, kl_in="reward", scale=scale).advantages(scores, logp, ref, mask, 3)
    torch.testing.assert_close(made, expected)
    assert keep.all()
    objective = GRPO(beta=0.01, kl_in="reward", scale=scale, drop_zero_spread=True)
    assert not objective.advantages(scores, logp, ref, mask, 3)[1].any()  # dropped groups do not affect the scale
    loo, _ = RLOO(beta=0.01, normalize=True).advantages(scores, logp, ref, mask, 3)
    torch.testing.assert_close(loo, 1.5 * expected)  # K / (K - 1)


def test_a_group_without_spread_has_no_gradient():
    logp, old, ref, scores, mask = rollout()
    scores[K:] = 1.0
    for objective in (GRPO(beta=0.0), DAPO()):
        loss_of(objective, logp, old, ref, scores, mask).backward()
        assert logp.grad[:K].abs().sum() > 0 and logp.grad[K:].abs().sum() == 0
        logp.grad = None
    kept, dropped = (
        loss_of(GRPO(beta=0.0, drop_zero_spread=drop), logp, old, ref, scores, mask) for drop in (False, True)
    )
    assert dropped.item() == pytest.approx(2 * kept.item())  # the divisor counts the remaining groups
    with_kl = loss_of(GRPO(beta=0.5, drop_zero_spread=True), logp, old, ref, scores, mask)
    assert torch.autograd.grad(with_kl, logp)[0][K:].abs().sum() == 0


@pytest.mark.parametrize("objective", [GRPO(), DrGRPO(), DAPO(), GSPO(), RLOO()], ids=lambda o: type(o).__name__)
def test_masked_tokens_are_not_read(objective):
    """Tool tokens and padding: any value there gives the same loss and no gradient."""
    logp, old, ref, scores, mask = rollout()
    mask = mask.clone()
    mask[0, 1:3] = False  # a gap, as a tool's turn leaves
    loss = loss_of(objective, logp, old, ref, scores, mask)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert gradient[~mask].abs().max() == 0 and gradient[mask].abs().max() > 0
    other = [torch.where(mask, x.detach(), x.detach() - 3.0).requires_grad_() for x in (logp, old, ref)]
    assert loss_of(objective, *other, scores, mask).item() == pytest.approx(loss.item(), rel=1e-12)


def test_shapes_that_would_broadcast_are_refused():
    logp, old, ref, scores, mask = rollout()
    for objective in (GRPO(), RLOO()):
        with pytest.raises(ValueError, match="shape"):
            objective(logp, old, ref, scores.unsqueeze(1).expand_as(logp), mask)
        with pytest.raises(ValueError, match="shape"):
            objective(logp, old[:, :1], ref, scores, mask)
