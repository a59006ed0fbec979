import pytest
import torch

from rlhf.functional.masking import (
    first_true_index,
    last_index,
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
    response_mask,
)
from rlhf.functional.reduction import weighted_mean

X = torch.tensor([[1.0, 2.0, float("nan")], [6.0, float("inf"), -5.0]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])  # unmasked: 1, 2, 6


def test_reductions_by_hand():
    """Unmasked values 1, 2, 6: sum 9, mean 3, squared deviations 4 + 1 + 9 = 14, unbiased variance 7."""
    assert masked_sum(X, MASK).item() == 9
    assert masked_mean(X, MASK).item() == 3
    assert masked_var(X, MASK).item() == 7
    assert masked_mean(X, MASK, dim=1).tolist() == [1.5, 6.0]
    assert masked_sum(X, MASK.bool(), dim=0).tolist() == [7.0, 2.0, 0.0]


def test_reductions_with_everything_masked():
    none = torch.zeros_like(MASK)
    assert masked_mean(X, none).item() == 0
    assert masked_var(X, none).item() == 0
    assert masked_whiten(X, none).eq(0).all()


def test_mask_broadcasts():
    x = torch.arange(6.0).view(2, 3)
    assert masked_mean(x, torch.tensor([1, 0, 1])).item() == 2.5
    assert masked_mean(x, torch.tensor([[1], [0]])).item() == 1.0


def test_masked_values_have_no_gradient():
    x = X.clone().requires_grad_()
    masked_whiten(x, MASK).square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert x.grad[MASK == 0].eq(0).all()


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_by_hand(shift_mean):
    """(x - 3) / sqrt(7), and 3 added back when the mean is not shifted: by hand -0.7559, -0.3780, 1.1339."""
    whitened = masked_whiten(X, MASK, shift_mean)
    expected = torch.tensor([-0.7559289, -0.3779645, 1.1338934]) + (0.0 if shift_mean else 3.0)
    torch.testing.assert_close(whitened[MASK.bool()], expected, rtol=0, atol=1e-6)
    assert whitened[MASK == 0].eq(0).all()
    assert masked_mean(whitened, MASK).item() == pytest.approx(0.0 if shift_mean else 3.0, abs=1e-6)
    assert masked_var(whitened, MASK).item() == pytest.approx(1.0, abs=1e-6)


def test_first_and_last_indices_of_a_mask():
    mask = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]])
    assert first_true_index(mask).tolist() == [1, 4, 0]
    assert last_index(mask).tolist() == [3, -1, 2]


def test_response_mask_ends_with_the_first_eos():
    eos = 9
    ids = torch.tensor([[5, 9, 9, 9], [9, 1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 9]])
    assert response_mask(ids, eos).int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_weighted_mean_does_not_depend_on_the_split():
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(12, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(12, generator=generator, dtype=torch.float64)
    weights[3] = 0
    total = weights.sum()
    whole = weighted_mean(losses, weights, total)
    assert whole.item() == pytest.approx(((losses * weights).sum() / weights.sum()).item())
    (expected,) = torch.autograd.grad(whole, losses)
    for sizes in ([4, 4, 4], [1, 11], [5, 2, 5]):
        pieces = [weighted_mean(*piece, total) for piece in zip(losses.split(sizes), weights.split(sizes), strict=True)]
        assert sum(pieces).item() == pytest.approx(whole.item())
        torch.testing.assert_close(torch.autograd.grad(sum(pieces), losses)[0], expected)


def test_weighted_mean_does_not_read_weight_zero():
    losses = torch.tensor([1.0, float("nan")])
    assert weighted_mean(losses, torch.tensor([1.0, 0.0]), 1.0).item() == 1.0
