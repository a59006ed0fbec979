"""Base classes of objectives, and cross-entropy, which three stages share.

An objective is a frozen dataclass: its fields are the YAML's hyperparameters, its `__call__` is the formula. It returns
the term *inside* the expectation, one number per token, pair, label or sample, and never a mean: the stage averages
over exactly the weighted elements, so that splitting a batch into micro-batches or over ranks does not change the loss.
It also returns a dictionary of metrics of the same shape, detached.

The base class determines which stages can use an objective: a stage takes `PairObjective`, hence any subclass of it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.functional.masking import SumOver

__all__ = [
    "ContrastObjective",
    "CrossEntropy",
    "GroupObjective",
    "LabelObjective",
    "Metrics",
    "Objective",
    "PairContext",
    "PairLogps",
    "PairObjective",
    "PolicyObjective",
    "ScoreObjective",
    "TokenObjective",
    "require_same_shape",
    "win_rate",
]

Metrics = dict[str, Tensor]


def require_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError unless all shapes are equal: [B] against [B, 1] would broadcast and train silently wrong."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"these tensors must have one shape: {shapes}")


def win_rate(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return 1 where `chosen` is larger, 0 where smaller, 1/2 where equal (an untrained model then has 0.5, not 0)."""
    return 0.5 * (torch.sign(chosen - rejected) + 1.0)


class Objective(ABC):
    """Base class of all objectives. Derive from one of its subclasses below."""

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Metrics]:
        """Return the losses and metrics, unreduced, of one shape."""


class TokenObjective(Objective):
    """Loss per target token; used by pretrain, sft, rejection_sampling and the pretraining term of ppo."""

    @abstractmethod
    def __call__(self, logps: Tensor) -> tuple[Tensor, Metrics]:
        """Return the losses [B, T] (any shape) from log-probabilities of the target tokens, same shape, in nats."""


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
        """Mean log-probability per token of the chosen response, [P]."""
        return self.chosen / self.chosen_length.clamp(min=1)

    @property
    def rejected_mean(self) -> Tensor:
        """Mean log-probability per token of the rejected response, [P]."""
        return self.rejected / self.rejected_length.clamp(min=1)


@dataclass(frozen=True)
class PairContext:
    """Inputs of some pair objectives beside log-probabilities; a stage sets those that `needs_*` requests."""

    chosen_score: Tensor | None = None  # [P] numeric score of the chosen response, by the annotator
    rejected_score: Tensor | None = None  # [P]
    prompt_embedding: Tensor | None = None  # [P, E] one vector per pair's prompt
    prompt_index: Tensor | None = None  # [P] long, equal for pairs of one prompt; None: all prompts differ


class PairObjective(Objective):
    """Loss per (chosen, rejected) pair; used by dpo."""

    @property
    def needs_reference(self) -> bool:
        """Return whether `reference` is read; if not, the stage loads no reference model."""
        return True

    @property
    def needs_scores(self) -> bool:
        """Return whether the comparisons must have numeric scores (`PairContext.chosen_score`, `rejected_score`)."""
        return False

    @property
    def needs_prompt_embedding(self) -> bool:
        """Return whether `PairContext.prompt_embedding` is read."""
        return False

    @property
    def couples_pairs(self) -> bool:
        """Return whether a pair's loss depends on the other pairs of the batch; it then receives all at once."""
        return False

    @abstractmethod
    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the losses [P] and metrics [P]. `reference` may be None exactly when `needs_reference` is False."""


class LabelObjective(Objective):
    """Loss per individually labelled (good or bad) response; used by dpo and kto."""

    @staticmethod
    def reference_point(policy: Tensor, reference: Tensor) -> Tensor:
        """Return z (scalar): the mean log-ratio of *mismatched* prompt and response pairs [M], at least 0, detached.

        A mismatched response is the response to another prompt. The rows are those of the whole batch, of all ranks.
        """
        return (policy - reference).mean().clamp(min=0).detach()

    @abstractmethod
    def __call__(self, policy: Tensor, reference: Tensor, desirable: Tensor, kl: Tensor) -> tuple[Tensor, Metrics]:
        """Return the losses [N] and metrics [N].

        Args:
            policy: Summed log-probabilities under the policy, [N].
            reference: Summed log-probabilities under the reference, [N].
            desirable: Labels, [N] (bool).
            kl: The reference point z, a scalar.
        """


class ContrastObjective(Objective):
    """Loss that contrasts the good responses of a batch with its bad ones, of any prompts; used by dpo and kto.

    It receives the rows of the whole batch, of all ranks.
    """

    @property
    def needs_prompt_embedding(self) -> bool:
        """Return whether `embedding` is read."""
        return False

    @abstractmethod
    def __call__(
        self, policy: Tensor, reference: Tensor, desirable: Tensor, embedding: Tensor | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the losses [N] and metrics; all losses are 0 if the batch holds only one kind of response.

        Args:
            policy: Summed log-probabilities under the policy, [N].
            reference: Summed log-probabilities under the reference, [N].
            desirable: Labels, [N] (bool).
            embedding: Vector of each response's prompt, [N, E].
        """


class ScoreObjective(Objective):
    """Loss per pair of scalar scores; used by reward_model."""

    @property
    def needs_grades(self) -> bool:
        """Return whether the loss depends on `grade`; data without grades is then refused."""
        return False

    @abstractmethod
    def __call__(self, chosen: Tensor, rejected: Tensor, grade: Tensor) -> tuple[Tensor, Metrics]:
        """Return the losses [P] from scores [P]; `grade` [P] (long) is an index into GRADES, -1 where unknown."""


class PolicyGradientObjective(Objective):
    """Loss per sampled token."""

    def sampler_weights(self, old_logp: Tensor, sampler_logp: Tensor, mask: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the weights [B, R] of the policy-gradient term, and where a bound changed them [B, R] (bool).

        Called where a sampler's distribution may differ from the policy's. None, the default: no correction; the loss
        is then called without `sampler_weights`.
        """
        return None


class PolicyObjective(PolicyGradientObjective):
    """Loss per sampled token, and the estimation of advantages from scores; used by ppo."""

    beta: float  # KL coefficient of the reward, the initial one when it adapts
    gamma: float  # pretraining coefficient: weight of the pretraining loss in the same optimizer step; 0: no text

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
        """Return rewards, advantages and returns, [B, R] each, of a whole rollout batch: `score` [B], the rest [B, R].

        `beta` is the current KL coefficient; None means the field's. `sum_over` sums a tensor over all ranks, where
        each holds a part of the rollout.
        """

    def next_beta(self, beta: float, kl: float, n: int, total: int | None = None) -> float:
        """Return the KL coefficient after `n` more sequences; constant unless overridden.

        Args:
            beta: Current KL coefficient.
            kl: Mean summed KL of the `n` sequences, nats.
            n: Sequences since the last call.
            total: Sequences in the whole run.
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
        sampler_weights: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """Return the losses [B, R] and metrics [B, R]; the stage averages both under the response mask.

        `sampler_weights` [B, R] multiply the policy-gradient term; None: 1.
        """


class GroupObjective(PolicyGradientObjective):
    """Loss per sampled token whose baseline is the other responses to the same prompt; used by grpo and rloo."""

    beta: float  # KL coefficient
    gamma: float  # pretraining coefficient: weight of the pretraining loss in the same optimizer step; 0: no text

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
        """Return the advantages [B] of a whole rollout, and which responses the loss counts [B] (bool).

        `scores` [B], the rest [B, R]; the `samples` responses to one prompt are consecutive rows. `sum_over` sums a
        tensor over all ranks, where each holds a part of the rollout.
        """

    @abstractmethod
    def weights(self, mask: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Return the weight of every token's loss [B, R] and each response's contribution to the loss denominator [B].

        `longest` is the largest number of tokens in a response.
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
        sampler_weights: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """Return the losses [B, R] and metrics [B, R], among them `ratio` and `approx_kl`.

        `advantages` [B], the rest [B, R]. `sampler_weights` multiply the policy-gradient term; None: 1.
        """


@dataclass(frozen=True)
class CrossEntropy(TokenObjective):
    """Negative log-likelihood of the target tokens: `-log p(x_t | x_<t)`. No hyperparameters."""

    def __call__(self, logps: Tensor) -> tuple[Tensor, Metrics]:
        """Return the losses, same shape as `logps`, in nats per token; perplexity is exp of their mean."""
        return -logps, {}
