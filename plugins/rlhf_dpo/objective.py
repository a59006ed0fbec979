"""Direct preference optimisation and its relatives: one dataclass per published loss on a pair of its own.

Losses that read the whole batch, or single labelled replies, are in ``batch_objective``.

Symbols: `u_c`, `u_r` = log pi(y | x) - log pi_ref(y | x) of the chosen and the rejected response, summed over the
response's tokens; `delta = u_c - u_r`; a bar is the mean over tokens instead of the sum. P pairs.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rlhf.functional.ratio import capped_exp
from rlhf.objective import Metrics, PairContext, PairLogps, PairObjective, require_same_shape, win_rate

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
FlipRate = Annotated[float, Field(ge=0, lt=0.5)]


def log_ratios(policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
    """`u_c` and `u_r` [P]. Raises ValueError without a reference, or with one of another batch."""
    if reference is None:
        raise ValueError("this objective compares the policy with a reference model, and was given none")
    require_same_shape(policy=policy.chosen, reference=reference.chosen)
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected


def mean_log_ratios(policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
    """`u_c` and `u_r` [P] as means per token."""
    chosen, rejected = log_ratios(policy, reference)
    return chosen / policy.chosen_length.clamp(min=1), rejected / policy.rejected_length.clamp(min=1)


def reward_metrics(policy: PairLogps, chosen_reward: Tensor, rejected_reward: Tensor) -> Metrics:
    """Metrics [P] that every loss on pairs reports; a reward here is the one its loss implies."""
    metrics = {
        "accuracy": win_rate(chosen_reward, rejected_reward),
        "reward_margin": chosen_reward - rejected_reward,
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
        "chosen_logp": policy.chosen_mean,
        "rejected_logp": policy.rejected_mean,
    }
    return {name: value.detach() for name, value in metrics.items()}


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0 without cancellation; x is held below -1e-7, where a probability is not yet 1."""
    x = x.clamp(max=-1e-7)
    near = x > -0.6931472
    # Each form is given harmless values where the other is taken: an infinite slope times 0 is nan.
    return torch.where(
        near,
        torch.log(-torch.expm1(x.masked_fill(~near, -0.5))),
        torch.log1p(-torch.exp(x.masked_fill(near, -1.0))),
    )


@dataclass(frozen=True)
class DPO(PairObjective):
    """`-(1 - e) log sigmoid(beta * delta) - e log sigmoid(-beta * delta)`, with e = `label_smoothing`.

    Rafailov et al. 2023 (arXiv 2305.18290, eq. 7); e > 0 is conservative DPO (Mitchell 2023). `reference_free` takes
    the reference as uniform (its log-ratio is 0), as in eric-mitchell/direct-preference-optimization. Sums over tokens.
    """

    beta: Positive = 0.1
    label_smoothing: FlipRate = 0.0
    reference_free: bool = False

    @property
    def needs_reference(self) -> bool:
        return not self.reference_free

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Losses [P]; log 2 when policy and reference agree."""
        chosen, rejected = (policy.chosen, policy.rejected) if self.reference_free else log_ratios(policy, reference)
        logits = self.beta * (chosen - rejected)
        losses = -(1 - self.label_smoothing) * F.logsigmoid(logits) - self.label_smoothing * F.logsigmoid(-logits)
        return losses, reward_metrics(policy, self.beta * chosen, self.beta * rejected)


@dataclass(frozen=True)
class DPONLL(PairObjective):
    """`-log sigmoid(beta * delta) - nll_coefficient * mean log pi(y_c | x)`: DPO that keeps the chosen likely.

    Iterative reasoning preference optimisation (Pang et al. 2024, arXiv 2404.19733; TRL's `rpo_alpha` was the
    coefficient). Log-ratios are sums over tokens, the likelihood is a mean per token.
    """

    beta: Positive = 0.1
    nll_coefficient: NotNegative = 1.0

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Losses [P]."""
        losses, metrics = DPO(self.beta)(policy, reference)
        return losses - self.nll_coefficient * policy.chosen_mean, metrics | {"dpo_loss": losses.detach()}


@dataclass(frozen=True)
class DPONorm(PairObjective):
    """`-log sigmoid(beta * (mean u_c - mean u_r))`: DPO on log-ratios per token (Tulu 3, arXiv 2411.15124).

    Means over tokens: its `beta` is some fifty times that of `DPO` (replies of fifty tokens).
    """

    beta: Positive = 5.0

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Losses [P]; log 2 when policy and reference agree."""
        chosen, rejected = mean_log_ratios(policy, reference)
        losses = -F.logsigmoid(self.beta * (chosen - rejected))
        return losses, reward_metrics(policy, self.beta * chosen, self.beta * rejected)


@dataclass(frozen=True)
class Robust(PairObjective):
    """`[-(1 - e) log sigmoid(beta * delta) + e log sigmoid(-beta * delta)] / (1 - 2e)`, e = `flip_rate`.

    Provably robust DPO (Chowdhury et al. 2024, arXiv 2403.00409): unbiased when a share e of the labels is flipped.
    Sums over tokens.
    """

    beta: Positive = 0.1
    flip_rate: FlipRate = 0.1

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Losses [P]; log 2 when policy and reference agree; may be negative."""
        chosen, rejected = log_ratios(policy, reference)
        logits = self.beta * (chosen - rejected)
        losses = -(1 - self.flip_rate) * F.logsigmoid(logits) + self.flip_rate * F.logsigmoid(-logits)
        return losses / (1 - 2 * self.flip_rate), reward_metrics(policy, self.beta * chosen, self.beta * rejected)


@dataclass(frozen=True)
class IPO(PairObjective):
    """`(delta - 1 / (2 beta))^2` (Azar et al. 2023, arXiv 2310.12036, eq. 17; their tau is `beta`).

    With `length_normalized` log-ratios are means per token, as TRL does; sums otherwise, as the paper writes it and
    OpenRLHF does. A `beta` does not carry over from one to the other.
    """

    beta: Positive = 0.1
    length_normalized: bool = False

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Losses [P]; 1 / (4 beta^2) when policy and reference agree."""
        ratios = mean_log_ratios if self.length_normalized else log_ratios
        chosen, rejected = ratios(policy, reference)
        losses = (chosen - rejected - 1 / (2 * self.beta)).square()
        return losses, reward_metrics(policy, self.beta * chosen, self.beta * rejected)


@dataclass(frozen=True)
class Hinge(PairObjective):
    """`max(0, 1 - beta * delta)`: the loss of SLiC-HF (arXiv 2305.10425) on DPO's margin (RSO, arXiv 2309.06657).

    Sums over tokens.
    """

    beta: Positive = 0.1

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Losses [P]; 1 when policy and reference agree."""
        chosen, rejected = log_ratios(policy, reference)
        losses = torch.relu(1 - self.beta * (chosen - rejected))
        return losses, reward_metrics(policy, self.beta * chosen, self.beta * rejected)


@dataclass(frozen=True)
class SimPO(PairObjective):
    """`-log sigmoid(beta * (mean log pi(y_c) - mean log pi(y_r)) - target_margin)`, without a reference.

    Meng et al. 2024 (arXiv 2405.14734, eq. 6; their gamma is `target_margin`). Means over tokens. The margin stands
    outside beta, as in the paper, and as `simpo_gamma` of TRL and LLaMA-Factory; the SimPO code and open-instruct give
    gamma / beta (`gamma_beta_ratio`): multiply that by `beta`.
    """

    beta: Positive = 2.0
    target_margin: NotNegative = 0.5

    @property
    def needs_reference(self) -> bool:
        return False

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Losses [P]."""
        chosen, rejected = self.beta * policy.chosen_mean, self.beta * policy.rejected_mean
        return -F.logsigmoid(chosen - rejected - self.target_margin), reward_metrics(policy, chosen, rejected)


@dataclass(frozen=True)
class ORPO(PairObjective):
    """`-mean log pi(y_c) - odds_coefficient * log sigmoid(log odds(y_c) - log odds(y_r))`, without a reference.

    Hong et al. 2024 (arXiv 2403.07691, eq. 6 and 7; their lambda is `odds_coefficient`). odds = p / (1 - p) with p the
    geometric mean of the token probabilities: means over tokens throughout. The likelihood term is over the chosen
    response, not its prompt.
    """

    odds_coefficient: NotNegative = 0.1

    @property
    def needs_reference(self) -> bool:
        return False

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Losses [P]."""
        chosen, rejected = policy.chosen_mean, policy.rejected_mean
        log_odds_ratio = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
        losses = -chosen - self.odds_coefficient * F.logsigmoid(log_odds_ratio)
        metrics = reward_metrics(policy, self.odds_coefficient * chosen, self.odds_coefficient * rejected)
        return losses, metrics | {"log_odds_ratio": log_odds_ratio.detach()}


@dataclass(frozen=True)
class APOZero(PairObjective):
    """`1 - sigmoid(beta * u_c) + sigmoid(beta * u_r)`: chosen up, rejected down.

    D'Oosterlinck et al. 2024 (arXiv 2408.06266, eq. 7), for chosen responses better than the model's own.
    Sums over tokens.
    """

    beta: Positive = 0.1

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Losses [P]; 1 when policy and reference agree."""
        chosen, rejected = log_ratios(policy, reference)
        losses = torch.sigmoid(-self.beta * chosen) + torch.sigmoid(self.beta * rejected)
        return losses, reward_metrics(policy, self.beta * chosen, self.beta * rejected)


@dataclass(frozen=True)
class APODown(PairObjective):
    """`sigmoid(beta * u_c) + 1 - sigmoid(beta * delta)`: chosen down, rejected further down.

    D'Oosterlinck et al. 2024 (arXiv 2408.06266, eq. 8), for chosen responses worse than the model's own.
    Sums over tokens.
    """

    beta: Positive = 0.1

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Losses [P]; 1 when policy and reference agree."""
        chosen, rejected = log_ratios(policy, reference)
        losses = torch.sigmoid(self.beta * chosen) + torch.sigmoid(-self.beta * (chosen - rejected))
        return losses, reward_metrics(policy, self.beta * chosen, self.beta * rejected)


@dataclass(frozen=True)
class SPPO(PairObjective):
    """`(u_c - 1 / (2 beta))^2 + (u_r + 1 / (2 beta))^2`: self-play PO with hard win probabilities 1 and 0.

    Wu et al. 2024 (arXiv 2405.00675, eq. 4.7; their 1 / eta is `beta`). Sums over tokens.
    """

    beta: Positive = 0.1

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Losses [P]; 1 / (2 beta^2) when policy and reference agree."""
        chosen, rejected = log_ratios(policy, reference)
        target = 0.5 / self.beta
        losses = (chosen - target).square() + (rejected + target).square()
        return losses, reward_metrics(policy, self.beta * chosen, self.beta * rejected)


@dataclass(frozen=True)
class NCA(PairObjective):
    """`-log sigmoid(r_c) - [log sigmoid(-r_c) + log sigmoid(-r_r)] / 2` with r = beta * u.

    Noise contrastive alignment (Chen et al. 2024, arXiv 2402.05369), its form for pairs: works on absolute rewards, so
    that the chosen does not fall with the rejected. Sums over tokens.
    """

    beta: Positive = 0.1

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Losses [P]; 2 log 2 when policy and reference agree."""
        chosen, rejected = (self.beta * ratio for ratio in log_ratios(policy, reference))
        losses = -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))
        return losses, reward_metrics(policy, chosen, rejected)


@dataclass(frozen=True)
class EXO(PairObjective):
    """KL(Bernoulli(sigmoid(beta * delta)) || Bernoulli(1 - e)), e = `label_smoothing`: the reverse of DPO's KL.

    Ji et al. 2024 (arXiv 2402.00856, eq. 16), for pairs. e must be positive: at 0 the divergence is infinite.
    Sums over tokens.
    """

    beta: Positive = 0.1
    label_smoothing: Annotated[float, Field(gt=0, lt=0.5)] = 0.001

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Losses [P], 0 at the optimum."""
        chosen, rejected = log_ratios(policy, reference)
        logits = self.beta * (chosen - rejected)
        target = torch.logit(torch.tensor(1 - self.label_smoothing, dtype=torch.float64)).item()
        losses = bernoulli_kl(logits, torch.full_like(logits, target))
        return losses, reward_metrics(policy, self.beta * chosen, self.beta * rejected)


def bernoulli_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(Bernoulli(sigmoid(p_logits)) || Bernoulli(sigmoid(q_logits))), any shape."""
    yes = F.logsigmoid(p_logits) - F.logsigmoid(q_logits)
    no = F.logsigmoid(-p_logits) - F.logsigmoid(-q_logits)
    return torch.sigmoid(p_logits) * yes + torch.sigmoid(-p_logits) * no


@dataclass(frozen=True)
class DiscoPOP(PairObjective):
    """`(1 - w) * -log sigmoid(l) + w * exp(-l)`, l = beta * delta, w = sigmoid(l / temperature).

    The log-ratio modulated loss that a language model found (Lu et al. 2024, arXiv 2406.08414, eq. 5). It is not
    convex: at the default temperature its slope at l = 0 is positive, so training starts by shrinking the margin.
    Sums over tokens.
    """

    beta: Positive = 0.1
    temperature: Positive = 0.05

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Losses [P]."""
        chosen, rejected = log_ratios(policy, reference)
        logits = self.beta * (chosen - rejected)
        # w exp(-l) as one exponential: apart, exp(-l) overflows where w is 0
        exponential = capped_exp(F.logsigmoid(logits / self.temperature) - logits)
        losses = torch.sigmoid(-logits / self.temperature) * -F.logsigmoid(logits) + exponential
        return losses, reward_metrics(policy, self.beta * chosen, self.beta * rejected)


@dataclass(frozen=True)
class RewardAware(PairObjective):
    """Makes `beta * delta` match `score_scale * (s_c - s_r)`, the gap of numeric scores s.

    Reward-aware preference optimisation (Sun et al. 2025, arXiv 2502.00203; Nemotron-4, arXiv 2406.11704). `distance`:
    `squared` difference of the two; or KL between the Bernoulli distributions that they are logits of, with the scores
    first (`kl_scores_policy`, NeMo's rpo_bwd_kl) or the policy first (`kl_policy_scores`, NeMo's rpo_fwd_kl).
    Log-ratios are sums over tokens; scores are the annotator's, on its own scale.
    """

    beta: Positive = 0.1
    score_scale: Positive = 1.0
    distance: Literal["squared", "kl_scores_policy", "kl_policy_scores"] = "kl_scores_policy"

    @property
    def needs_scores(self) -> bool:
        return True

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Losses [P], 0 at the optimum. Raises ValueError without scores in `context`."""
        if context is None or context.chosen_score is None or context.rejected_score is None:
            raise ValueError("reward-aware preference optimisation needs a numeric score of every response")
        chosen, rejected = log_ratios(policy, reference)
        logits = self.beta * (chosen - rejected)
        target = self.score_scale * (context.chosen_score - context.rejected_score).to(logits.dtype).detach()
        require_same_shape(log_probabilities=logits, scores=target)
        if self.distance == "squared":
            losses = (logits - target).square()
        elif self.distance == "kl_scores_policy":
            losses = bernoulli_kl(target, logits)
        else:
            losses = bernoulli_kl(logits, target)
        metrics = reward_metrics(policy, self.beta * chosen, self.beta * rejected)
        return losses, metrics | {"target_margin": target}
