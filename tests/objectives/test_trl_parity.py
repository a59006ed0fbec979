"""Every loss that TRL also has, against TRL's own code: values and gradients.

TRL's losses are inside its trainers, so the methods are called on a stand-in that holds only what they read, with
models that return made-up log-probabilities.
"""

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from rlhf.objective import PairLogps
from rlhf_dpo.batch_objective import KTO
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
    Robust,
    SimPO,
)
from rlhf_reward_model.objective import Pairwise

pytest.importorskip("trl", reason="TRL is the reference of these tests: pip install 'rlhf[dev]'")

PAIRS, LENGTH = 5, 9


class Accelerator:
    """Accelerator stand-in of one process, without device placement."""

    device = torch.device("cpu")
    gather = gather_for_metrics = staticmethod(lambda x: x)
    autocast = staticmethod(nullcontext)


class Model(torch.nn.Module):
    """Model that returns given per-token log-probabilities [rows, LENGTH - 1] for any input."""

    is_gradient_checkpointing = False
    config = SimpleNamespace(use_cache=False)

    def __init__(self, logps):
        super().__init__()
        self.logps = logps

    def forward(self, **inputs):
        zeros = torch.zeros_like(self.logps).detach()
        return SimpleNamespace(log_probs=self.logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def batch(rows):
    """Return per-token log-probabilities of policy (a leaf) and reference, and the completion mask [rows, LENGTH]."""
    generator = torch.Generator().manual_seed(0)
    first, last = (
        torch.randint(1, 5, (rows,), generator=generator),
        torch.randint(5, LENGTH, (rows,), generator=generator),
    )
    positions = torch.arange(LENGTH)
    mask = (positions >= first.unsqueeze(1)) & (positions <= last.unsqueeze(1))
    policy, reference = -2 * torch.rand(2, rows, LENGTH - 1, generator=generator, dtype=torch.float64)
    policy, reference = (policy * mask[:, 1:]).detach().requires_grad_(), reference * mask[:, 1:]
    return policy, reference, mask


def pair_logps(logps, mask):
    sums, lengths = logps.sum(1).view(2, -1), mask.sum(1).view(2, -1)
    return PairLogps(sums[0], sums[1], lengths[0], lengths[1])


def trl_dpo(loss_types, policy, reference, mask, loss_weights=None, **hyperparameters):
    from trl.trainer.dpo_trainer import DPOTrainer

    stand_in = SimpleNamespace(
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        model=Model(policy),
        ref_model=Model(reference),
        f_divergence_type="reverse_kl",
        loss_types=loss_types,
        loss_weights=loss_weights or [1.0] * len(loss_types),
        use_weighting=False,
        label_smoothing=hyperparameters.pop("label_smoothing", 0.0),
        beta=hyperparameters.pop("beta", 0.1),
        args=SimpleNamespace(
            gradient_checkpointing_kwargs=None, discopop_tau=hyperparameters.pop("discopop_tau", 0.05)
        ),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    assert not hyperparameters
    inputs = {
        "input_ids": torch.ones(mask.shape, dtype=torch.long),
        "attention_mask": torch.ones(mask.shape, dtype=torch.long),
        "completion_mask": mask.long(),
    }
    loss = DPOTrainer._compute_loss(stand_in, stand_in.model, inputs, return_outputs=False)
    return loss, {name: values[-1] for name, values in stand_in._metrics["train"].items()}


@pytest.mark.parametrize(
    "objective, loss_type, hyperparameters",
    [
        (DPO(beta=0.3), "sigmoid", {"beta": 0.3}),
        (Robust(beta=0.3, flip_rate=0.2), "robust", {"beta": 0.3, "label_smoothing": 0.2}),
        (Robust(beta=0.3, flip_rate=0.4), "robust", {"beta": 0.3, "label_smoothing": 0.4}),
        (IPO(beta=0.3, length_normalized=True), "ipo", {"beta": 0.3}),
        (Hinge(beta=0.3), "hinge", {"beta": 0.3}),
        (DPONorm(beta=5.0), "sigmoid_norm", {"beta": 5.0}),
        (APOZero(beta=0.3), "apo_zero", {"beta": 0.3}),
        (APODown(beta=0.3), "apo_down", {"beta": 0.3}),
        (SPPO(beta=0.3), "sppo_hard", {"beta": 0.3}),
        (NCA(beta=0.3), "nca_pair", {"beta": 0.3}),
        (EXO(beta=0.3, label_smoothing=0.01), "exo_pair", {"beta": 0.3, "label_smoothing": 0.01}),
        (DiscoPOP(beta=0.05), "discopop", {"beta": 0.05}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_dpo_family(objective, loss_type, hyperparameters):
    policy, reference, mask = batch(2 * PAIRS)
    expected, expected_metrics = trl_dpo([loss_type], policy, reference, mask, **hyperparameters)
    losses, metrics = objective(pair_logps(policy, mask), pair_logps(reference, mask))
    assert losses.mean().item() == pytest.approx(expected.item(), abs=1e-6, rel=1e-6)
    made, wanted = (torch.autograd.grad(loss, policy)[0] for loss in (losses.mean(), expected))
    torch.testing.assert_close(made, wanted, atol=1e-6, rtol=1e-5)
    assert metrics["accuracy"].mean().item() == pytest.approx(expected_metrics["rewards/accuracies"])
    if loss_type not in ("ipo", "sigmoid_norm"):  # whose rewards TRL reports without the length
        assert metrics["reward_margin"].mean().item() == pytest.approx(expected_metrics["rewards/margins"], abs=1e-6)


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_dpo_with_label_smoothing(rate):
    """TRL's `sigmoid` has no smoothing, but its `aot` has, and a single pair has nothing to sort."""
    policy, reference, mask = batch(2 * PAIRS)
    pairs = [torch.tensor([i, i + PAIRS]) for i in range(PAIRS)]
    expected = torch.stack(
        [trl_dpo(["aot"], policy[i], reference[i], mask[i], beta=0.3, label_smoothing=rate)[0] for i in pairs]
    )
    losses, _ = DPO(beta=0.3, label_smoothing=rate)(pair_logps(policy, mask), pair_logps(reference, mask))
    torch.testing.assert_close(losses, expected, atol=1e-6, rtol=1e-6)
    made, wanted = (torch.autograd.grad(loss.mean(), policy)[0] for loss in (losses, expected))
    torch.testing.assert_close(made, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_dpo_without_a_reference_with_label_smoothing(rate, experimental):
    """The preference term of TRL's CPO: its `sigmoid` reads no reference, and has the smoothing."""
    from trl.experimental.cpo import CPOTrainer

    policy, _, mask = batch(2 * PAIRS)
    pairs = pair_logps(policy, mask)
    stand_in = SimpleNamespace(
        alpha=0.0, loss_type="sigmoid", beta=0.3, label_smoothing=rate, accelerator=Accelerator()
    )
    expected, *_ = CPOTrainer.cpo_loss(stand_in, pairs.chosen, pairs.rejected)
    losses, _ = DPO(beta=0.3, label_smoothing=rate, reference_free=True)(pairs)
    torch.testing.assert_close(losses, expected, atol=1e-6, rtol=1e-6)


def test_dpo_nll():
    """TRL averages the likelihood term over the batch's tokens, here it is per pair: equal for one pair."""
    policy, reference, mask = batch(2)
    expected, _ = trl_dpo(["sigmoid", "sft"], policy, reference, mask, loss_weights=[1.0, 0.7], beta=0.3)
    losses, _ = DPONLL(beta=0.3, nll_coefficient=0.7)(pair_logps(policy, mask), pair_logps(reference, mask))
    assert losses.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.fixture
def experimental(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def test_simpo(experimental):
    from trl.experimental.cpo import CPOTrainer

    policy, _, mask = batch(2 * PAIRS)
    pairs = pair_logps(policy, mask)
    stand_in = SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=0.7, beta=2.5, label_smoothing=0.0, accelerator=Accelerator()
    )
    expected, *_ = CPOTrainer.cpo_loss(stand_in, pairs.chosen_mean, pairs.rejected_mean)
    torch.testing.assert_close(SimPO(beta=2.5, target_margin=0.7)(pairs)[0], expected, atol=1e-6, rtol=1e-6)


def test_orpo(experimental):
    from trl.experimental.orpo import ORPOTrainer

    policy, _, mask = batch(2 * PAIRS)
    pairs = pair_logps(policy, mask)
    stand_in = SimpleNamespace(beta=0.4, accelerator=Accelerator())
    ratio_term, *_ = ORPOTrainer.odds_ratio_loss(stand_in, pairs.chosen_mean, pairs.rejected_mean)
    expected = (
        -pairs.chosen_mean - ratio_term
    )  # TRL computes its likelihood over prompt and response; the paper does not
    losses, _ = ORPO(odds_coefficient=0.4)(pairs)
    torch.testing.assert_close(losses, expected, atol=1e-6, rtol=1e-6, check_dtype=False)


def test_kto():
    from trl.trainer.kto_trainer import KTOTrainer

    policy, reference, mask = batch(6)
    mismatched, mismatched_reference = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.0, -4.0])
    kl_logps = iter([mismatched, mismatched_reference])
    desirable = torch.tensor([True, False, True, True, False, False])
    stand_in = SimpleNamespace(
        accelerator=Accelerator(),
        model=Model(policy),
        ref_model=Model(reference),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        calculate_KL=True,
        loss_type="kto",
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.8,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        _compute_kl_logps=lambda model, batch: next(kl_logps),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.ones(mask.shape, dtype=torch.long),
        "attention_mask": torch.ones(mask.shape, dtype=torch.long),
        "completion_mask": mask.long(),
        "label": desirable,
    }
    expected = KTOTrainer._compute_loss(stand_in, stand_in.model, inputs, return_outputs=False)
    z = KTO.reference_point(mismatched, mismatched_reference)
    objective = KTO(beta=0.3, desirable_weight=1.5, undesirable_weight=0.8)
    losses, _ = objective(policy.sum(1), reference.sum(1), desirable, z)
    assert z.item() == pytest.approx(stand_in._metrics["train"]["kl"][-1])
    assert losses.mean().item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("centering", [0.0, 0.01])
@pytest.mark.parametrize("margin", ["none", "small", "large"])
def test_reward_model(margin, centering):
    from trl.trainer.reward_trainer import RewardTrainer

    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2 * PAIRS, generator=generator, requires_grad=True)
    grade = torch.tensor([0, 1, 2, 3, -1])
    objective = Pairwise(margin=margin, centering=centering)
    losses, metrics = objective(scores[:PAIRS], scores[PAIRS:], grade)
    stand_in = SimpleNamespace(
        model=torch.nn.Identity(),
        args=SimpleNamespace(center_rewards_coefficient=centering or None),
        accelerator=Accelerator(),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(1), "margin": metrics["margin"]}
    output = SimpleNamespace(logits=scores.unsqueeze(1))
    expected = RewardTrainer.compute_loss(stand_in, lambda **_: output, inputs)
    assert losses.mean().item() == pytest.approx(expected.item(), abs=1e-6)
    made, wanted = (torch.autograd.grad(loss, scores, retain_graph=True)[0] for loss in (losses.mean(), expected))
    torch.testing.assert_close(made, wanted, atol=1e-6, rtol=1e-5)
    assert metrics["accuracy"].mean().item() == pytest.approx(stand_in._metrics["train"]["accuracy"][-1])


def test_token_logprobs_and_entropy():
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    from rlhf.functional.logprobs import token_logprobs

    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50)
    hidden, targets = torch.randn(12, 8), torch.randint(50, (12,))
    logps, entropy = token_logprobs(hidden, targets, head, temperature=0.7, entropy=True)
    logits = head(hidden) / 0.7
    torch.testing.assert_close(logps, selective_log_softmax(logits, targets), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(entropy, entropy_from_logits(logits), atol=1e-6, rtol=1e-6)
