"""Products with packed weights are those of ``linear``."""

import pytest
import torch
from torch import nn

from rlhf.models import packed_weights
from rlhf.models.packed_weights import MAX_ROWS, packed_bytes


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.Sequential:
    """Return a model whose first two layers are large enough to be packed."""
    monkeypatch.setattr(packed_weights, "MIN_WEIGHTS", 40 * 24)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24, bias=False), nn.Linear(24, 8))


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 7), (2, MAX_ROWS), (0,)])
@torch.no_grad()
def test_values_are_those_of_the_plain_layers(model: nn.Sequential, shape: tuple[int, ...]) -> None:
    rows = torch.randn(*shape, 24, generator=torch.Generator().manual_seed(1))
    expected = model(rows)
    with packed_weights.packed_weights(model):
        assert ["forward" in vars(layer) for layer in model] == [True, True, False]
        torch.testing.assert_close(model(rows), expected, atol=1e-6, rtol=1e-6)
    assert not any("forward" in vars(layer) for layer in model)


@torch.no_grad()
def test_the_weights_are_those_at_the_start(model: nn.Sequential) -> None:
    rows = torch.randn(4, 24)
    for _ in range(2):
        with packed_weights.packed_weights(model):
            packed = model(rows)
        torch.testing.assert_close(packed, model(rows), atol=1e-6, rtol=1e-6)
        model[0].weight.mul_(2)


@torch.no_grad()
def test_layers_are_restored_after_an_error_and_others_stay(model: nn.Sequential) -> None:
    with pytest.raises(ZeroDivisionError), packed_weights.packed_weights(model):
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in model)
    with torch.autocast("cpu", torch.bfloat16), packed_weights.packed_weights(model):
        assert not any("forward" in vars(layer) for layer in model)
    with packed_weights.packed_weights(model.bfloat16()):
        assert not any("forward" in vars(layer) for layer in model)
    assert packed_bytes(nn.Linear(24, 40)) == 4 * 24 * 40 and packed_bytes(nn.Linear(24, 8)) == 0
