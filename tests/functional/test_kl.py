import math

import pytest
import torch

from rlhf.functional.kl import ESTIMATORS, adaptive_beta, k1, k2, k3


def test_kl_estimators_by_hand():
    """log ratio log 2: k1 = 0.6931, k2 = 0.2402, k3 = 1/2 - 1 + 0.6931 = 0.1931."""
    logp, ref = torch.tensor([0.0], dtype=torch.float64), torch.tensor([-math.log(2)], dtype=torch.float64)
    assert k1(logp, ref).item() == pytest.approx(math.log(2))
    assert k2(logp, ref).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert k3(logp, ref).item() == pytest.approx(math.log(2) - 0.5)


def test_equal_models_have_zero_kl():
    logp = torch.randn(20)
    for estimator in ESTIMATORS.values():
        assert estimator(logp, logp).eq(0).all()


def test_kl_expectations_over_a_categorical():
    """Summed exactly over p, k1 and k3 are KL(p || q); k2 and k3 are never negative."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.log_softmax(torch.randn(2, 11, generator=generator, dtype=torch.float64), -1)
    kl = (p.exp() * (p - q)).sum()
    for estimator in (k1, k3):
        torch.testing.assert_close((p.exp() * estimator(p, q)).sum(), kl)
    assert k2(p, q).ge(0).all() and k3(p, q).ge(0).all()


def test_gradient_of_k1_has_zero_mean_and_of_k2_is_that_of_kl():
    """Why k1 must not be a loss: its expected gradient over samples of p is 0; k2's is the gradient of KL."""
    generator = torch.Generator().manual_seed(1)
    logits, other = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    p, q = torch.log_softmax(logits, -1), torch.log_softmax(other, -1)
    weights = p.exp().detach()
    (true,) = torch.autograd.grad((p.exp() * (p - q)).sum(), logits, retain_graph=True)
    (of_k1,) = torch.autograd.grad((weights * k1(p, q)).sum(), logits, retain_graph=True)
    (of_k2,) = torch.autograd.grad((weights * k2(p, q)).sum(), logits, retain_graph=True)
    torch.testing.assert_close(of_k1, torch.zeros_like(of_k1))
    torch.testing.assert_close(of_k2, true)


def test_k3_keeps_small_differences():
    """For a log ratio of 1e-4 k3 is about 5e-9; the naive exp(r) - 1 - r loses it in fp32."""
    assert k3(torch.tensor([1e-4]), torch.tensor([0.0])).item() == pytest.approx(5e-9, rel=0.05)


def test_adaptive_beta_by_hand():
    """KL twice the target: error clipped at 0.2, 512 of 10000 sequences: 1 + 0.2 * 0.0512."""
    assert adaptive_beta(0.1, 12.0, 512, 6.0, 10000) == pytest.approx(0.1 * 1.01024)
    assert adaptive_beta(0.1, 0.0, 512, 6.0, 10000) == pytest.approx(0.1 * 0.98976)
    assert adaptive_beta(0.1, 6.6, 1000, 6.0, 10000) == pytest.approx(0.1 * 1.01)
    assert adaptive_beta(0.1, 6.0, 512, 6.0, 10000) == 0.1


def test_adaptive_beta_stays_positive():
    """More sequences than the horizon count as the horizon: 1024 of 100 gave 0.05 * (1 - 0.2 * 10.24) < 0."""
    assert adaptive_beta(0.05, 0.0, 1024, 6.0, 100) == pytest.approx(0.04)
    assert adaptive_beta(0.05, 100.0, 1024, 6.0, 100) == pytest.approx(0.06)
