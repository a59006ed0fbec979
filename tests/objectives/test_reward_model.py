import math

import pytest
import torch

from rlhf_reward_model.objective import GRADES, MARGINS, Pairwise


def test_pairwise_loss_by_hand():
    """Gap 1: -log sigmoid(1) = 0.3133; at equal scores log 2."""
    losses, metrics = Pairwise()(torch.tensor([2.0, 0.5]), torch.tensor([1.0, 0.5]), torch.tensor([-1, 3]))
    assert losses.tolist() == pytest.approx([0.31326169, math.log(2)])
    assert metrics["accuracy"].tolist() == [1.0, 0.5]
    assert metrics["margin"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "margin, expected",
    [
        ("none", [0, 0, 0, 0]),
        ("small", [0, 1 / 3, 2 / 3, 1]),
        ("large", [0, 1, 2, 3]),
        ({"significantly": 1.5, "slightly": 0.5}, [0, 0.5, 0, 1.5]),
    ],
)
def test_margins_by_grade(margin, expected):
    """Llama 2, Table 27, in the order negligible, slightly, better, significantly; an unknown grade has none."""
    grade = torch.tensor([0, 1, 2, 3, -1])
    objective = Pairwise(margin=margin)
    losses, metrics = objective(torch.full((5,), 4.0), torch.zeros(5), grade)
    assert metrics["margin"].tolist() == pytest.approx([*expected, 0])
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-(4.0 - m))) for m in [*expected, 0]])
    assert metrics["ranking_loss"].tolist() == pytest.approx([math.log1p(math.exp(-4.0))] * 5)
    assert objective.needs_grades == any(expected)


def test_grades_are_those_of_the_records():
    records = pytest.importorskip("rlhf.data.records")
    assert records.GRADES == GRADES
    assert all(set(table) <= set(GRADES) for table in MARGINS.values())


def test_centering_by_hand():
    """(2 + 1)^2 = 9, coefficient 0.01."""
    scores, grade = (torch.tensor([2.0]), torch.tensor([1.0])), torch.tensor([0])
    plain, centred = Pairwise()(*scores, grade)[0], Pairwise(centering=0.01)(*scores, grade)[0]
    assert (centred - plain).item() == pytest.approx(0.09, abs=1e-6)


def test_gradient_by_hand():
    """d/dr_c = -sigmoid(-(gap - m)); without centering only the gap matters, with it the sum is pulled to 0."""
    chosen, rejected = torch.tensor([1.0], requires_grad=True), torch.tensor([0.0], requires_grad=True)
    losses, _ = Pairwise(margin="large")(chosen, rejected, torch.tensor([3]))
    by_chosen, by_rejected = torch.autograd.grad(losses.sum(), [chosen, rejected])
    assert by_chosen.item() == pytest.approx(-1 / (1 + math.exp(-2.0)))
    assert by_rejected.item() == pytest.approx(-by_chosen.item())
    losses, _ = Pairwise(centering=0.5)(chosen, rejected, torch.tensor([3]))
    by_chosen, by_rejected = torch.autograd.grad(losses.sum(), [chosen, rejected])
    assert (by_chosen + by_rejected).item() == pytest.approx(2 * 2 * 0.5 * 1.0)


def test_a_column_of_scores_is_refused():
    """[P, 1] against [P] would broadcast to [P, P] and train."""
    with pytest.raises(ValueError, match="one shape"):
        Pairwise()(torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3, dtype=torch.long))


def test_half_precision_scores_are_upcast():
    losses, _ = Pairwise()(torch.tensor([1.0]).bfloat16(), torch.tensor([0.0]).bfloat16(), torch.tensor([0]))
    assert losses.dtype == torch.float32
