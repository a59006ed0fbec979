import torch
from torch import nn

from rlhf.models.ema import EMA


def test_ema_by_hand():
    """0.9 * 0 + 0.1 * 1 = 0.1, then 0.9 * 0.1 + 0.1 * 2 = 0.29."""
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.zero_()
    average = EMA(module, 0.9)
    for value, expected in ((1.0, 0.1), (2.0, 0.29)):
        module.weight.data.fill_(value)
        average.update()
        torch.testing.assert_close(average.state["weight"], torch.tensor([[expected]]))


def test_weights_are_restored_bit_for_bit_after_the_ema_was_applied():
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    average = EMA(module, 0.5)
    before = module.weight.detach().clone()
    average.update()
    module.weight.data.add_(1.0)
    own, where = module.weight.detach().clone(), module.weight.data_ptr()
    with average.applied():
        assert torch.equal(module.weight, before)
    assert torch.equal(module.weight, own) and module.weight.data_ptr() == where
    assert set(average.state) == {"weight"}  # frozen weights have no EMA


def test_the_ema_of_bfloat16_weights_is_in_float32():
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    module.weight.data.zero_()
    average = EMA(module, 0.999)
    module.weight.data.fill_(1.0)
    for _ in range(3):
        average.update()
    assert abs(average.state["weight"].item() - (1 - 0.999**3)) < 1e-6
    with average.applied():
        assert module.weight.dtype == torch.bfloat16
