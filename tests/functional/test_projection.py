"""Projection to the vocabulary: few rows are multiplied from the other side, with the results of the head."""

import pytest
import torch
from torch import nn

from rlhf.functional.projection import FEW_ROWS, project


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_logits_are_those_of_the_head(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    head, hidden = nn.Linear(24, 500, bias=bias), torch.randn(rows, 24)
    logits = project(hidden, head)
    assert logits.is_contiguous()
    torch.testing.assert_close(logits, head(hidden), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_head_that_is_more_than_a_matrix_is_called() -> None:
    head = nn.Linear(4, 8)
    head.register_forward_hook(lambda module, inputs, output: output + 1)
    hidden = torch.randn(2, 4)
    assert torch.equal(project(hidden, head), head(hidden))


def test_a_gradient_takes_the_plain_way() -> None:
    head, hidden = nn.Linear(4, 8), torch.randn(2, 4, requires_grad=True)
    assert torch.equal(project(hidden, head), head(hidden))
