"""Gradient caching: losses that couple a batch have the same values and gradients in micro-batches."""

import pytest
import torch
from torch import Tensor

from rlhf_dpo.gradient_caching import CachedLosses, cache_losses

SIZES = (1, 3, 2)


def spread(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return squared distances from the batch's mean, and the distances."""
    return (x - x.mean()).square(), {"distance": (x - x.mean()).detach()}


def test_values_and_derivatives_by_hand() -> None:
    """The derivative of sum_i w_i (x_i - m)^2 by x_j is 2 w_j (x_j - m) - 2/N sum_i w_i (x_i - m)."""
    x, weight = torch.tensor([0.0, 1.0, 5.0]), torch.tensor([1.0, 0.5, 0.5])  # m = 2, and the sum of w (x - m) is -1
    found = cache_losses(spread, [x], weight, slice(None), [1, 2])
    assert [part.tolist() for part in found.losses] == [[4.0], [1.0, 9.0]]
    assert [part["distance"].tolist() for part in found.metrics] == [[-2.0], [-1.0, 3.0]]
    derivatives = torch.cat([part[0] for part in found.derivatives])
    torch.testing.assert_close(derivatives, torch.tensor([-4 + 2 / 3, -1 + 2 / 3, 3 + 2 / 3]))
    assert not x.requires_grad and not any(part.requires_grad for part in found.losses)


def test_the_rows_of_a_rank_are_its_own() -> None:
    whole = cache_losses(spread, [torch.arange(4.0)], torch.ones(4), slice(None), [2, 2])
    second = cache_losses(spread, [torch.arange(4.0)], torch.ones(4), slice(2, 4), [1, 1])
    assert torch.equal(torch.cat(second.losses), whole.losses[1])
    assert torch.equal(torch.cat([part[0] for part in second.derivatives]), whole.derivatives[1][0])


def test_without_gradients_the_derivatives_are_zero() -> None:
    with torch.no_grad():
        found = cache_losses(spread, [torch.tensor([0.0, 1.0, 5.0])], torch.ones(3), slice(None), [3])
    assert found.losses[0].tolist() == [4.0, 1.0, 9.0] and found.derivatives[0][0].tolist() == [0.0, 0.0, 0.0]


def test_a_slope_has_the_derivatives_as_its_gradient() -> None:
    cached = CachedLosses([], [], [(torch.tensor([2.0, 3.0]), torch.tensor([-1.0, 4.0]))])
    first, second = (torch.tensor(values, requires_grad=True) for values in ([1.0, 1.0], [5.0, 2.0]))
    slope = cached.slope(0, first, second)
    assert slope.tolist() == [2.0 - 5.0, 3.0 + 8.0]
    slope.sum().backward()
    assert first.grad is not None and second.grad is not None
    assert first.grad.tolist() == [2.0, 3.0] and second.grad.tolist() == [-1.0, 4.0]


@pytest.mark.parametrize("weighted", [False, True])
def test_micro_batches_have_the_gradient_of_plain_autograd_on_the_batch(weighted: bool) -> None:
    """Two kinds of log-probabilities are linear in the parameters; the loss couples all of them."""
    generator = torch.Generator().manual_seed(0)
    inputs, others = torch.randn(2, sum(SIZES), 5, dtype=torch.float64, generator=generator)
    start = torch.randn(5, dtype=torch.float64, generator=generator)
    weight = torch.rand(len(inputs), dtype=torch.float64, generator=generator) + 0.1
    weight = weight if weighted else torch.ones_like(weight)

    def objective(a: Tensor, b: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return -torch.nn.functional.logsigmoid(a.unsqueeze(1) - b.unsqueeze(0)).mean(dim=1), {}

    plain = start.clone().requires_grad_()
    losses, _ = objective(inputs @ plain, others @ plain)
    (losses * weight).sum().backward()

    cut = start.clone().requires_grad_()
    logps = [(inputs @ cut).detach(), (others @ cut).detach()]
    cached = cache_losses(objective, logps, weight, slice(None), SIZES)
    torch.testing.assert_close(torch.cat(cached.losses), losses.detach())
    for index, (a, b) in enumerate(zip(inputs.split(SIZES), others.split(SIZES), strict=True)):
        cached.slope(index, a @ cut, b @ cut).sum().backward()
    torch.testing.assert_close(cut.grad, plain.grad, atol=1e-12, rtol=1e-10)
