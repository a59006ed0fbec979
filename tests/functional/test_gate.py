import torch

from rlhf.functional.gate import safety_gate


def test_gate_table():
    """An unsafe tag, or safety below 0.15, selects the safety score; at exactly 0.15 helpfulness is used."""
    helpfulness = torch.full((5,), 0.9)
    safety = torch.tensor([0.8, 0.8, 0.1, 0.1, 0.15])
    unsafe = torch.tensor([True, False, True, False, False])
    torch.testing.assert_close(safety_gate(helpfulness, safety, unsafe), torch.tensor([0.8, 0.9, 0.1, 0.1, 0.9]))
