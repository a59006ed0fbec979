import torch

from rlhf.functional.gate import safety_gate, whitened_logit


def test_gate_table():
    """unsafe tag, or safety below 0.15, and safety speaks; at 0.15 exactly helpfulness does."""
    helpfulness = torch.full((5,), 0.9)
    safety = torch.tensor([0.8, 0.8, 0.1, 0.1, 0.15])
    unsafe = torch.tensor([True, False, True, False, False])
    torch.testing.assert_close(safety_gate(helpfulness, safety, unsafe), torch.tensor([0.8, 0.9, 0.1, 0.1, 0.9]))


def test_whitened_logit_is_finite_and_standard():
    """logit(0.5) = 0, logit(0.731...) = 1, logit(0.268...) = -1: variance 1, so the result is the logit itself."""
    logits = torch.tensor([-1.0, 0.0, 1.0])
    torch.testing.assert_close(whitened_logit(torch.sigmoid(logits)), logits)
    assert whitened_logit(torch.tensor([0.0, 0.5, 1.0])).isfinite().all()
