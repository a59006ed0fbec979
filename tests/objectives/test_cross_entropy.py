import torch
import torch.nn.functional as F

from rlhf.functional.logprobs import token_logprobs
from rlhf.functional.reduction import weighted_mean
from rlhf.objective import CrossEntropy


def test_cross_entropy_equals_that_of_torch():
    """Mean over the target tokens, from hidden states, against torch on all logits with ignored labels."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 13, bias=False)
    hidden, ids = torch.randn(2, 5, 8), torch.randint(13, (2, 5))
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    expected = F.cross_entropy(head(hidden).flatten(0, 1), ids.masked_fill(~mask, -100).flatten())
    logps = torch.zeros(2, 5)
    logps[mask] = token_logprobs(hidden[mask], ids[mask], head)[0]
    losses, _ = CrossEntropy()(logps)
    torch.testing.assert_close(weighted_mean(losses, mask.float(), mask.sum()), expected)
