"""What an objective is, and the one that three stages share (cross-entropy).

An objective is a frozen dataclass: its fields are the YAML's knobs, its `__call__` is the formula. It returns the term
*inside* the expectation, one number per token, pair, label or sample, and never a mean: the stage averages over
exactly what counts, so that a batch cut into micro-batches or over processes gives the same loss. Beside it comes a
dictionary of metrics of the same shape, detached.

The base class says which stage can use an objective: a stage asks for `PairObjective`, and any subclass will do.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.functional.masking import SumOver

Metrics = dict[str, Tensor]


def require_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError unless all shapes are equal: [B] against [B, 1] would broadcast and train silently wrong."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"these tensors must have one shape: {shapes}")


def win_rate(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where `chosen` is larger, 0 where smaller, 1/2 where equal (so an untrained model reads 0.5, not 0)."""
    return 0.5 * (torch.sign(chosen - rejected) + 1.0)


class Objective(ABC):
    """Base of all objectives. Use one of the subclasses below."""

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Metrics]:
        """Losses and metrics, unreduced, of one shape."""


class TokenObjective(Objective):
    """A loss per target token; used by pretrain, sft, rejection_sampling and the gamma term of ppo."""

    @abstractmethod
    def __call__(self, logps: Tensor) -> tuple[Tensor, Metrics]:
        """Losses [B, T] (any shape) from log-probabilities of the target tokens, same shape, in nats."""


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of P pairs of responses under one model."""

    chosen: Tensor  # [P] sum over the response's tokens, nats
    rejected: Tensor  # [P]
    chosen_length: Tensor  # [P] tokens that were summed, end-of-turn included
    rejected_length: Tensor  # [P]

    def __post_init__(self) -> None:
        require_same_shape(
            chosen=self.chosen,
            rejected=self.rejected,
            chosen_length=self.chosen_length,
            rejected_length=self.rejected_length,
        )

    @property
    def chosen_mean(self) -> Tensor:
        """[P] mean log-probability per token of the chosen response."""
        return self.chosen / self.chosen_length.clamp(min=1)

    @property
    def rejected_mean(self) -> Tensor:
        """[P] mean log-probability per token of the rejected response."""
        return self.rejected / self.rejected_length.clamp(min=1)


@dataclass(frozen=True)
class PairContext:
    """What some pair objectives read beside log-probabilities; a stage fills in what `needs_*` asks for."""

    chosen_score: Tensor | None = None  # [P] numeric score of the chosen response, by the annotator
    rejected_score: Tensor | None = None  # [P]
    prompt_embedding: Tensor | None = None  # [P, E] one vector per pair's prompt
    prompt_index: Tensor | None = None  # [P] long, equal for pairs of one prompt; None: all prompts differ


class PairObjective(Objective):
    """A loss per (chosen, rejected) pair; used by dpo."""

    @property
    def needs_reference(self) -> bool:
        """Whether `reference` is read; without it the stage loads no reference model."""
        return True

    @property
    def needs_scores(self) -> bool:
        """Whether the comparisons must carry numeric scores (`PairContext.chosen_score`, `rejected_score`)."""
        return False

    @property
    def needs_prompt_embedding(self) -> bool:
        """Whether `PairContext.prompt_embedding` is read."""
        return False

    @property
    def couples_pairs(self) -> bool:
        """Whether a pair's loss depends on the other pairs of the batch; it is then given all of them at once."""
        return False

    @abstractmethod
    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Losses [P] and metrics [P]. `reference` may be None exactly when `needs_reference` is False."""


class LabelObjective(Objective):
    """A loss per response that is labelled good or bad on its own; used by dpo and kto."""

    @staticmethod
    def reference_point(policy: Tensor, reference: Tensor) -> Tensor:
        """z (scalar): the mean log-ratio of *mismatched* prompt and response pairs [M], at least 0, detached.

        Mismatched: the response to another prompt. It is given the rows of the whole batch, of all processes.
        """
        return (policy - reference).mean().clamp(min=0).detach()

    @abstractmethod
    def __call__(self, policy: Tensor, reference: Tensor, desirable: Tensor, kl: Tensor) -> tuple[Tensor, Metrics]:
        """Losses [N] from summed log-probabilities [N] under both models, labels [N] (bool) and `kl`, a scalar."""


class ContrastObjective(Objective):
    """A loss that sets the good responses of a batch against its bad ones, of whatever prompts; used by dpo and kto.

    It is given the rows of the whole batch, of all processes.
    """

    @property
    def needs_prompt_embedding(self) -> bool:
        """Whether `embedding` is read."""
        return False

    @abstractmethod
    def __call__(
        self, policy: Tensor, reference: Tensor, desirable: Tensor, embedding: Tensor | None = None
    ) -> tuple[Tensor, Metrics]:
        """Losses [N] from summed log-probabilities [N] under both models and labels [N] (bool); all 0 where the batch
        holds one kind alone. `embedding` [N, E] is a vector of each response's prompt.
        """


class ScoreObjective(Objective):
    """A loss per pair of scalar scores; used by reward_model."""

    @property
    def needs_grades(self) -> bool:
        """Whether the loss depends on `grade`; data without grades cannot serve it."""
        return False

    @abstractmethod
    def __call__(self, chosen: Tensor, rejected: Tensor, grade: Tensor) -> tuple[Tensor, Metrics]:
        """Losses [P] from scores [P]; `grade` [P] (long) is an index into GRADES, -1 where unknown."""


class PolicyObjective(Objective):
    """A loss per sampled token, and how advantages come from scores; used by ppo."""

    beta: float  # KL coefficient of the reward, at the start when it adapts
    gamma: float  # weight of the pretraining loss in the same optimizer step; 0 reads no text

    @abstractmethod
    def estimate(
        self,
        score: Tensor,
        logp: Tensor,
        ref_logp: Tensor,
        values: Tensor,
        mask: Tensor,
        beta: float | None = None,
        sum_over: SumOver | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rewards, advantages and returns, [B, R] each, of a whole rollout batch: `score` [B], the rest [B, R].

        `beta` is the current KL coefficient; None means the field's. `sum_over` adds up a tensor over all processes,
        where each holds a part of the rollout.
        """

    def next_beta(self, beta: float, kl: float, n: int, total: int | None = None) -> float:
        """KL coefficient after `n` more sequences, of `total` in the run, whose mean summed KL was `kl` nats; fixed
        unless overridden.
        """
        return beta

    @abstractmethod
    def __call__(
        self,
        logp: Tensor,
        old_logp: Tensor,
        advantages: Tensor,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        entropy: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """Losses [B, R] and metrics [B, R]; the stage averages both under the response mask."""


class GroupObjective(Objective):
    """A loss per sampled token whose baseline is the other replies to the same prompt; used by grpo and rloo."""

    beta: float  # KL coefficient
    gamma: float  # weight of the pretraining loss in the same optimizer step; 0 reads no text

    @abstractmethod
    def advantages(
        self,
        scores: Tensor,
        logp: Tensor,
        ref_logp: Tensor,
        mask: Tensor,
        samples: int,
        sum_over: SumOver | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Advantages [B] of a whole rollout, and which replies the loss counts [B] (bool).

        `scores` [B], the rest [B, R]; the `samples` replies to one prompt stand in consecutive rows. `sum_over` adds up
        a tensor over all processes, where each holds a part of the rollout.
        """

    @abstractmethod
    def weights(self, mask: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Weight of every token's loss [B, R], and what each reply adds to the divisor of their sum [B].

        `longest` is the most tokens a reply may have.
        """

    @abstractmethod
    def __call__(
        self,
        logp: Tensor,
        old_logp: Tensor,
        ref_logp: Tensor,
        advantages: Tensor,
        mask: Tensor,
        entropy: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """Losses [B, R] and metrics [B, R], `ratio` and `approx_kl` among them; `advantages` [B], the rest [B, R]."""


@dataclass(frozen=True)
class CrossEntropy(TokenObjective):
    """Negative log-likelihood of the target tokens: `-log p(x_t | x_<t)`. No knobs."""

    def __call__(self, logps: Tensor) -> tuple[Tensor, Metrics]:
        """Losses, same shape as `logps`, in nats per token; perplexity is exp of their mean."""
        return -logps, {}
