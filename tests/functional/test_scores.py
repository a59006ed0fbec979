import pytest
import torch

from rlhf.functional.masking import masked_whiten
from rlhf.functional.scores import Moments, missing_eos


def test_moments_of_batches_equal_those_of_all_scores():
    generator = torch.Generator().manual_seed(0)
    scores = 3 + 2 * torch.randn(50, generator=generator)
    moments = Moments()
    for part in scores.split([1, 7, 30, 12]):
        moments = moments.updated(part)
    assert moments.count == 50
    assert moments.mean == pytest.approx(scores.double().mean().item())
    assert moments.std == pytest.approx(scores.double().std().item())


def test_normalizing_by_the_moments_of_a_batch_is_whitening():
    scores = torch.tensor([1.0, 5.0, -2.0, 0.5])
    normal = Moments().updated(scores).normalize(scores)
    torch.testing.assert_close(normal, masked_whiten(scores, torch.ones(4)))


def test_equal_scores_stay_finite_when_normalized():
    scores = torch.full((4,), 0.3)
    assert Moments().updated(scores).normalize(scores).abs().max() < 1e-2


def test_without_two_different_scores_only_the_mean_is_subtracted():
    """No standard deviation exists yet: 1.0 was normalized to 10000."""
    scores = torch.tensor([1.0, -2.0])
    assert torch.equal(Moments().normalize(scores), scores)
    assert Moments().updated(torch.tensor([3.0])).normalize(scores).tolist() == [-2.0, -5.0]
    assert Moments().updated(torch.full((5,), 0.1)).normalize(scores).tolist() == pytest.approx([0.9, -2.1])


def parallel(parts, call):
    """Return what each of several ranks computes, when `sum_over` adds up the values of all at the same point."""
    given: list[list[torch.Tensor]] = []

    def first_pass(index, asked):
        def sum_over(x):
            number = asked[0]
            asked[0] += 1
            if len(given) > number and len(given[number]) == len(parts):
                return torch.stack(given[number]).sum(0)
            raise _Waits(number, x)

        return sum_over

    while True:
        waiting, results = {}, {}
        for index, part in enumerate(parts):
            try:
                results[index] = call(part, first_pass(index, [0]))
            except _Waits as stop:
                waiting[index] = stop
        if not waiting:
            return [results[index] for index in range(len(parts))]
        given.append([waiting[index].value for index in range(len(parts))])


class _Waits(Exception):
    def __init__(self, number, value):
        self.number, self.value = number, value


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_over_ranks_equals_whitening_of_the_whole(shift_mean):
    """Parts of different width and count, as ranks have them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, generator=generator) * 3 + 1
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 2, 2, 1])[:, None]
    whole = masked_whiten(x, mask, shift_mean)
    parts = [(x[:3], mask[:3]), (x[3:, :2], mask[3:, :2])]
    first, second = parallel(parts, lambda part, sum_over: masked_whiten(*part, shift_mean, sum_over))
    torch.testing.assert_close(first, whole[:3])
    torch.testing.assert_close(second, whole[3:, :2])
    alone = masked_whiten(*parts[0], shift_mean)
    assert not torch.allclose(alone, whole[:3])


def test_moments_over_ranks_equal_those_of_the_whole():
    scores = torch.tensor([1.0, 5.0, -2.0, 0.5, 7.0])
    first, second = parallel([scores[:2], scores[2:]], lambda part, sum_over: Moments().updated(part, sum_over))
    assert first == second
    assert (first.count, first.mean) == (5, pytest.approx(2.3))
    assert first.std == pytest.approx(scores.std().item())


@pytest.mark.parametrize(
    ("how", "expected"), [("subtract", [2.0, 1.0, -3.0]), ("replace", [2.0, -1.0, -1.0]), ("none", [2.0, 2.0, -2.0])]
)
def test_the_missing_eos_penalty_is_subtracted_or_replaces_the_score(how, expected):
    """Penalty 1: subtracted (3 - ... = 2 - 1), or -1 in place of the score; a response that ended keeps its score."""
    scores, ended = torch.tensor([2.0, 2.0, -2.0]), torch.tensor([True, False, False])
    assert missing_eos(scores, ended, 1.0, how).tolist() == expected
