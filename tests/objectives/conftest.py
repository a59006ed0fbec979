import pytest
import torch

from rlhf.objective import PairLogps


def make_pairs(seed: int, count: int = 6) -> tuple[PairLogps, PairLogps]:
    """Return policy and reference log-probabilities of `count` pairs, float64, the policy's requiring gradients."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (2, count), generator=generator)
    reference = -torch.rand(2, count, generator=generator, dtype=torch.float64) * lengths * 2 - 0.1
    policy = (reference + torch.randn(2, count, generator=generator, dtype=torch.float64)).clamp(max=-0.05)
    return (
        PairLogps(policy[0].requires_grad_(), policy[1].requires_grad_(), lengths[0], lengths[1]),
        PairLogps(reference[0], reference[1], lengths[0], lengths[1]),
    )


@pytest.fixture
def pairs() -> tuple[PairLogps, PairLogps]:
    return make_pairs(0)
