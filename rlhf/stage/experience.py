"""Experience: a rollout with the values that the optimizer steps on it read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from rlhf.data.collate import TokenBatch
from rlhf.models.language_model import LanguageModel
from rlhf.models.reference import Reference
from rlhf.sampler.rollout import Rollout

__all__ = ["Experience", "chunks", "response_logprobs"]


@dataclass(frozen=True)
class Experience:
    """Responses of a rollout and what was computed for them: B rows of prompt + response, R response tokens."""

    tokens: TokenBatch  # [B, P+R], the last R columns are the response; loss_mask on the policy's own tokens
    mask: Tensor  # [B, R] bool, loss_mask of the response alone
    logp: Tensor  # [B, R], under the policy before the updates
    ref_logp: Tensor  # [B, R], under the reference
    advantages: Tensor  # [B, R]; [B] where all tokens of a response share one
    values: Tensor | None = None  # [B, R], of the critic; None without one
    returns: Tensor | None = None  # [B, R], what the critic regresses on; None without one
    keep: Tensor | None = None  # [B] bool, whether the loss counts the response; None: all
    sampler_weights: Tensor | None = None  # [B, R], of the policy-gradient term; None: 1

    def __getitem__(self, rows: Tensor | slice) -> "Experience":
        values: list[Any] = [getattr(self, field.name) for field in fields(self)]
        picked: list[Any] = [None if value is None else value[rows] for value in values]
        return Experience(*picked)

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def width(self) -> int:
        """Number of response columns R."""
        return self.mask.shape[1]

    @property
    def correction(self) -> dict[str, Tensor]:
        """Argument of the objective for the sampler's correction; empty where there is none."""
        return {} if self.sampler_weights is None else {"sampler_weights": self.sampler_weights}

    def kept(self) -> "Experience":
        """Return only the rows that the loss counts; at least one row, so that there is something to read."""
        if self.keep is None:
            return self
        rows = self.keep.nonzero()[:, 0]
        return self[rows if len(rows) else slice(0, 1)]


@torch.no_grad()
def response_logprobs(
    policy: LanguageModel, reference: Reference, rollout: Rollout, temperature: float, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Compute the log-probabilities of the response tokens under a policy and its reference, [B, R] each.

    Args:
        policy: Policy, trained or not.
        reference: Frozen policy that KL is measured against.
        rollout: B responses; 0 where they are masked.
        temperature: Sampling temperature, which divides the logits of both.
        batch_size: Rows per forward pass.
    """
    return (
        score_rollout(lambda tokens: policy.logprobs(tokens, temperature)[0], rollout, batch_size),
        score_rollout(lambda tokens: reference.logprobs(tokens, temperature), rollout, batch_size),
    )


@torch.no_grad()
def score_rollout(score: Callable[[TokenBatch], Tensor], rollout: Rollout, batch_size: int) -> Tensor:
    """Compute a number for each response token, [B, R], by a function of ``batch_size`` rows at a time."""
    tokens, width = rollout.tokens, rollout.mask.shape[1]
    return torch.cat([score(tokens[rows])[:, -width:] for rows in chunks(len(tokens), batch_size)])


def chunks(count: int, size: int | None) -> Iterator[slice]:
    """Yield slices of at most ``size`` rows that cover ``range(count)``; None yields one slice."""
    size = size or max(count, 1)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
