import math

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


def one(chosen, rejected, chosen_length=1, rejected_length=1):
    return PairLogps(
        torch.tensor([chosen], dtype=torch.float64),
        torch.tensor([rejected], dtype=torch.float64),
        torch.tensor([chosen_length]),
        torch.tensor([rejected_length]),
    )


# u_c = 2, u_r = -1, delta = 3; per token (lengths 4 and 2) 0.5 and -0.5, delta 1
POLICY, REFERENCE = one(-4.0, -6.0, 4, 2), one(-6.0, -5.0, 4, 2)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x):
    return math.log(sigmoid(x))
