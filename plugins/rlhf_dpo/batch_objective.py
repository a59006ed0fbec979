"""Losses of the DPO family that read more than one pair: relative preference optimization, and KTO.

Symbols are those of ``objective``: `u` = log pi(y | x) - log pi_ref(y | x), summed over the response's tokens.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rlhf.objective import (
    ContrastObjective,
    LabelObjective,
    Metrics,
    PairContext,
    PairLogps,
    PairObjective,
    require_same_shape,
    win_rate,
)
from rlhf_dpo.log_ratios import NotNegative, Positive, log_ratios, reward_metrics


def contrasts(chosen: Tensor, rejected: Tensor, context: PairContext | None) -> tuple[Tensor, Tensor]:
    """Return `u_c,i - u_r,j` of all chosen i and rejected j [P, P], and which of them count [P, P] (bool).

    Within one prompt only the annotated pairs themselves count (i = j): in a ranking the chosen response of one pair
    may be worse than the rejected one of another.
    """
    own = torch.eye(len(chosen), dtype=torch.bool, device=chosen.device)
    counts = torch.ones_like(own)
    if context is not None and context.prompt_index is not None:
        counts = own | (context.prompt_index.unsqueeze(1) != context.prompt_index.unsqueeze(0))
    return chosen.unsqueeze(1) - rejected.unsqueeze(0), counts


@dataclass(frozen=True)
class ByNearness:
    """Base class of relative preference optimization, which weights prompts by their similarity.

    `nearness` is cos / temperature, whose softmax is that of -(1 - cos) / temperature: the constant drops out.
    """

    beta: Positive = 0.1
    temperature: Positive = 0.5
    pooling: Literal["mean", "last"] = "mean"
    encoder: str | None = None

    @property
    def needs_prompt_embedding(self) -> bool:
        """True: the weights come from embeddings of the prompts."""
        return True

    def nearness(self, embedding: Tensor | None) -> Tensor:
        """Return the scaled cosine similarities [N, N] of N prompts with embeddings [N, E].

        Raises:
            ValueError: There are no embeddings.
        """
        if embedding is None:
            raise ValueError("relative preference optimization needs an embedding of every prompt")
        e = F.normalize(embedding.detach().float(), dim=-1)
        return e @ e.t() / self.temperature


@dataclass(frozen=True)
class Relative(ByNearness, PairObjective):
    """Relative preference optimization on pairs.

    `mean_j -log sigmoid(beta * w_ij * (u_c,i - u_r,j))`, w_i = softmax_j(-(1 - cos(e_i, e_j)) / temperature).

    Yin et al. 2024 (arXiv 2402.10958, paired). Log-ratios are sums over tokens. Each chosen response is contrasted with
    the rejected responses of all prompts of the batch, similar prompts with more weight. The batch includes all ranks
    and all micro-batches, so neither changes the loss, but the batch size does. `e` [P, E] embeds the prompts: hidden
    states of the frozen reference, pooled over the prompt's tokens, or those of `encoder`.
    """

    @property
    def couples_pairs(self) -> bool:
        """True: a pair's loss reads the other pairs of the batch."""
        return True

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the losses [P] and metrics [P]; log 2 when policy and reference agree.

        Raises:
            ValueError: `context.prompt_embedding` is missing.
        """
        nearness = self.nearness(None if context is None else context.prompt_embedding)
        chosen, rejected = log_ratios(policy, reference)
        differences, counts = contrasts(chosen, rejected, context)
        logits = self.beta * torch.softmax(nearness.masked_fill(~counts, -torch.inf), dim=-1) * differences
        losses = -F.logsigmoid(logits).masked_fill(~counts, 0.0).sum(dim=1) / counts.sum(dim=1)
        return losses, reward_metrics(policy, self.beta * chosen, self.beta * rejected)


@dataclass(frozen=True)
class RelativeDiagonal(PairObjective):
    """Relative preference optimization with diagonal weighting.

    `w * l_ii + (1 - w) * mean_{j != i} l_ij`, l_ij = -log sigmoid(beta * (u_c,i - u_r,j)), w = `own_weight`.

    Yin et al. 2024 (arXiv 2402.10958): no embeddings; all other prompts of the batch have the same weight. Sums over
    tokens; the batch is as for `Relative`. w = 1 is DPO.
    """

    beta: Positive = 0.1
    own_weight: Annotated[float, Field(ge=0, le=1)] = 0.8

    @property
    def couples_pairs(self) -> bool:
        """True: a pair's loss reads the other pairs of the batch."""
        return True

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the losses [P] and metrics [P]; log 2 when policy and reference agree."""
        chosen, rejected = log_ratios(policy, reference)
        differences, counts = contrasts(chosen, rejected, context)
        terms = -F.logsigmoid(self.beta * differences)
        own = terms.diagonal()
        others = counts & ~torch.eye(len(own), dtype=torch.bool, device=own.device)
        mean = terms.masked_fill(~others, 0.0).sum(dim=1) / others.sum(dim=1).clamp(min=1)
        weight = torch.where(
            others.any(dim=1), self.own_weight, 1.0
        )  # a pair alone in its batch has no others to average
        losses = weight * own + (1 - weight) * mean
        return losses, reward_metrics(policy, self.beta * chosen, self.beta * rejected)


@dataclass(frozen=True)
class RelativeUnpaired(ByNearness, ContrastObjective):
    """Relative preference optimization on labelled responses, without pairs.

    `mean_ij -log sigmoid(beta * w_ij * (u_i - u_j))`, w_i = softmax_j(-(1 - cos(e_i, e_j)) / temperature).

    Yin et al. 2024 (arXiv 2402.10958, unpaired): every good response i of the batch is contrasted with every bad one j,
    of any prompts; the softmax runs over the bad ones. Log-ratios are sums over tokens, and `e` [N, E] embeds the
    prompts, as for `Relative`.
    """

    def __call__(
        self, policy: Tensor, reference: Tensor, desirable: Tensor, embedding: Tensor | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the losses [N], whose mean is the mean over all contrasts, and metrics [N].

        The losses are 0 without responses of both kinds.
        """
        require_same_shape(policy=policy, reference=reference, desirable=desirable)
        nearness = self.nearness(embedding)
        good = desirable.bool()
        ratio = policy - reference
        differences = ratio[good].unsqueeze(1) - ratio[~good].unsqueeze(0)
        weight = torch.softmax(nearness[good][:, ~good], dim=1)
        terms = -F.logsigmoid(self.beta * weight * differences)
        losses, accuracy = (_shares(x, good, ratio) for x in (terms, win_rate(differences, torch.zeros_like(terms))))
        metrics = {"reward": self.beta * ratio, "accuracy": accuracy}
        return losses, {name: value.detach() for name, value in metrics.items()}


def _shares(terms: Tensor, good: Tensor, like: Tensor) -> Tensor:
    """Distribute good-against-bad terms [G, N - G] over the N responses, with the same mean.

    Half of every term goes to its good and half to its bad response.
    """
    if not terms.numel():
        return like * 0.0
    count = len(good)
    shares = torch.empty(count, dtype=terms.dtype, device=terms.device)
    shares[good] = terms.mean(dim=1) * (count / (2 * terms.shape[0]))
    shares[~good] = terms.mean(dim=0) * (count / (2 * terms.shape[1]))
    return shares


@dataclass(frozen=True)
class KTO(LabelObjective):
    """Kahneman-Tversky optimization on single responses with a label.

    `w_d * (1 - sigmoid(beta * (u - z)))` for desirable, `w_u * (1 - sigmoid(beta * (z - u)))` for undesirable
    responses.

    Ethayarajh et al. 2024 (arXiv 2402.01306, eq. 7 and 8). Sums over tokens. z is an estimate of KL(pi || pi_ref)
    without gradient: see `reference_point`.
    """

    beta: Positive = 0.1
    desirable_weight: NotNegative = 1.0
    undesirable_weight: NotNegative = 1.0

    def __call__(self, policy: Tensor, reference: Tensor, desirable: Tensor, kl: Tensor) -> tuple[Tensor, Metrics]:
        """Return the losses [N] and metrics [N] from summed log-probabilities [N], labels [N] (bool) and z."""
        require_same_shape(policy=policy, reference=reference, desirable=desirable)
        ratio = policy - reference
        good = desirable.bool()
        gain = self.beta * torch.where(good, ratio - kl, kl - ratio)
        weight = torch.where(good, self.desirable_weight, self.undesirable_weight)
        reward = (self.beta * ratio).detach()
        metrics = {
            "reward": reward,
            "accuracy": win_rate(gain.detach(), torch.zeros_like(reward)),
            "kl": kl.detach().expand_as(reward),
        }
        return weight * torch.sigmoid(-gain), metrics
