"""Direct preference optimization and related losses: one dataclass per published loss on a single pair.

Losses that read the whole batch, or single labelled responses, are in ``batch_objective``.

Symbols: `u_c`, `u_r` = log pi(y | x) - log pi_ref(y | x) of the chosen and the rejected response, summed over the
response's tokens; `delta = u_c - u_r`; `mean` is the mean over tokens instead of the sum. P pairs.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rlhf.functional.ratio import capped_ratio
from rlhf.objective import Metrics, PairContext, PairLogps, PairObjective, require_same_shape
from rlhf_dpo.log_ratios import (
    FlipRate,
    NotNegative,
    Positive,
    bernoulli_kl,
    log1mexp,
    log_ratios,
    mean_log_ratios,
    reward_metrics,
)


@dataclass(frozen=True)
class DPO(PairObjective):
    """DPO loss: `-(1 - e) log sigmoid(beta * delta) - e log sigmoid(-beta * delta)`, with e = `label_smoothing`.

    Rafailov et al. 2023 (arXiv 2305.18290, eq. 7); e > 0 is conservative DPO (Mitchell 2023). `reference_free` takes
    the reference as uniform (its log-ratio is 0), as in eric-mitchell/direct-preference-optimization. Sums over tokens.
    """

    beta: Positive = 0.1
    label_smoothing: FlipRate = 0.0
    reference_free: bool = False

    @property
    def needs_reference(self) -> bool:
        """Return whether the reference is read: not with `reference_free`."""
        return not self.reference_free

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the losses [P] and metrics [P]; log 2 when policy and reference agree."""
        chosen, rejected = (policy.chosen, policy.rejected) if self.reference_free else log_ratios(policy, reference)
        logits = self.beta * (chosen - rejected)
        losses = -(1 - self.label_smoothing) * F.logsigmoid(logits) - self.label_smoothing * F.logsigmoid(-logits)
        return losses, reward_metrics(policy, self.beta * chosen, self.beta * rejected)


@dataclass(frozen=True)
class DPONLL(PairObjective):
    """DPO with a likelihood term: `-log sigmoid(beta * delta) - nll_coefficient * mean log pi(y_c | x)`.

    The second term keeps the chosen response likely. Iterative reasoning preference optimization (Pang et al. 2024,
    arXiv 2404.19733; TRL's `rpo_alpha` was the coefficient). Log-ratios are sums over tokens, the likelihood is a mean
    per token.
    """

    beta: Positive = 0.1
    nll_coefficient: NotNegative = 1.0

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the losses [P] and metrics [P]."""
        losses, metrics = DPO(self.beta)(policy, reference)
        return losses - self.nll_coefficient * policy.chosen_mean, metrics | {"dpo_loss": losses.detach()}


@dataclass(frozen=True)
class DPONorm(PairObjective):
    """Length-normalized DPO: `-log sigmoid(beta * (mean u_c - mean u_r))` (Tulu 3, arXiv 2411.15124).

    Means over tokens: its `beta` is some fifty times that of `DPO` (responses of fifty tokens).
    """

    beta: Positive = 5.0

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the losses [P] and metrics [P]; log 2 when policy and reference agree."""
        chosen, rejected = mean_log_ratios(policy, reference)
        losses = -F.logsigmoid(self.beta * (chosen - rejected))
        return losses, reward_metrics(policy, self.beta * chosen, self.beta * rejected)


@dataclass(frozen=True)
class Robust(PairObjective):
    """Robust DPO: `[-(1 - e) log sigmoid(beta * delta) + e log sigmoid(-beta * delta)] / (1 - 2e)`, e = `flip_rate`.

    Chowdhury et al. 2024 (arXiv 2403.00409): unbiased when a share e of the labels is flipped. Sums over tokens.
    """

    beta: Positive = 0.1
    flip_rate: FlipRate = 0.1

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the losses [P] and metrics [P]; log 2 when policy and reference agree; may be negative."""
        chosen, rejected = log_ratios(policy, reference)
        logits = self.beta * (chosen - rejected)
        losses = -(1 - self.flip_rate) * F.logsigmoid(logits) + self.flip_rate * F.logsigmoid(-logits)
        return losses / (1 - 2 * self.flip_rate), reward_metrics(policy, self.beta * chosen, self.beta * rejected)


@dataclass(frozen=True)
class IPO(PairObjective):
    """IPO loss: `(delta - 1 / (2 beta))^2` (Azar et al. 2023, arXiv 2310.12036, eq. 17; their tau is `beta`).

    With `length_normalized` log-ratios are means per token, as in TRL; otherwise sums, as in the paper and OpenRLHF. A
    `beta` does not carry over from one to the other.
    """

    beta: Positive = 0.1
    length_normalized: bool = False

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the losses [P] and metrics [P]; 1 / (4 beta^2) when policy and reference agree."""
        ratios = mean_log_ratios if self.length_normalized else log_ratios
        chosen, rejected = ratios(policy, reference)
        losses = (chosen - rejected - 1 / (2 * self.beta)).square()
        return losses, reward_metrics(policy, self.beta * chosen, self.beta * rejected)


@dataclass(frozen=True)
class Hinge(PairObjective):
    """Hinge loss `max(0, 1 - beta * delta)`: SLiC-HF's (arXiv 2305.10425) on DPO's margin (RSO, arXiv 2309.06657).

    Sums over tokens.
    """

    beta: Positive = 0.1

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the losses [P] and metrics [P]; 1 when policy and reference agree."""
        chosen, rejected = log_ratios(policy, reference)
        losses = torch.relu(1 - self.beta * (chosen - rejected))
        return losses, reward_metrics(policy, self.beta * chosen, self.beta * rejected)


@dataclass(frozen=True)
class SimPO(PairObjective):
    """SimPO loss: `-log sigmoid(beta * (mean log pi(y_c) - mean log pi(y_r)) - target_margin)`, without a reference.

    Meng et al. 2024 (arXiv 2405.14734, eq. 6; their gamma is `target_margin`). Means over tokens. The margin is not
    multiplied by beta, as in the paper and as `simpo_gamma` of TRL and LLaMA-Factory; the SimPO code and open-instruct
    give gamma / beta (`gamma_beta_ratio`): multiply that by `beta`.
    """

    beta: Positive = 2.0
    target_margin: NotNegative = 0.5

    @property
    def needs_reference(self) -> bool:
        """False."""
        return False

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the losses [P] and metrics [P]."""
        chosen, rejected = self.beta * policy.chosen_mean, self.beta * policy.rejected_mean
        return -F.logsigmoid(chosen - rejected - self.target_margin), reward_metrics(policy, chosen, rejected)


@dataclass(frozen=True)
class ORPO(PairObjective):
    """ORPO loss, without a reference.

    `-mean log pi(y_c) - odds_coefficient * log sigmoid(log odds(y_c) - log odds(y_r))`

    Hong et al. 2024 (arXiv 2403.07691, eq. 6 and 7; their lambda is `odds_coefficient`). odds = p / (1 - p) with p the
    geometric mean of the token probabilities: means over tokens throughout. The likelihood term covers the chosen
    response, not its prompt.
    """

    odds_coefficient: NotNegative = 0.1

    @property
    def needs_reference(self) -> bool:
        """False."""
        return False

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the losses [P] and metrics [P]."""
        chosen, rejected = policy.chosen_mean, policy.rejected_mean
        log_odds_ratio = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
        losses = -chosen - self.odds_coefficient * F.logsigmoid(log_odds_ratio)
        metrics = reward_metrics(policy, self.odds_coefficient * chosen, self.odds_coefficient * rejected)
        return losses, metrics | {"log_odds_ratio": log_odds_ratio.detach()}


@dataclass(frozen=True)
class APOZero(PairObjective):
    """APO-zero loss: `1 - sigmoid(beta * u_c) + sigmoid(beta * u_r)`, which moves chosen up and rejected down.

    D'Oosterlinck et al. 2024 (arXiv 2408.06266, eq. 7), for chosen responses better than the model's own. Sums over
    tokens.
    """

    beta: Positive = 0.1

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the losses [P] and metrics [P]; 1 when policy and reference agree."""
        chosen, rejected = log_ratios(policy, reference)
        losses = torch.sigmoid(-self.beta * chosen) + torch.sigmoid(self.beta * rejected)
        return losses, reward_metrics(policy, self.beta * chosen, self.beta * rejected)


@dataclass(frozen=True)
class APODown(PairObjective):
    """APO-down loss: `sigmoid(beta * u_c) + 1 - sigmoid(beta * delta)`, chosen down and rejected further down.

    D'Oosterlinck et al. 2024 (arXiv 2408.06266, eq. 8), for chosen responses worse than the model's own. Sums over
    tokens.
    """

    beta: Positive = 0.1

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the losses [P] and metrics [P]; 1 when policy and reference agree."""
        chosen, rejected = log_ratios(policy, reference)
        losses = torch.sigmoid(self.beta * chosen) + torch.sigmoid(-self.beta * (chosen - rejected))
        return losses, reward_metrics(policy, self.beta * chosen, self.beta * rejected)


@dataclass(frozen=True)
class SPPO(PairObjective):
    """SPPO loss: `(u_c - 1 / (2 beta))^2 + (u_r + 1 / (2 beta))^2`, with hard win probabilities 1 and 0.

    Self-play preference optimization (Wu et al. 2024, arXiv 2405.00675, eq. 4.7; their 1 / eta is `beta`). Sums over
    tokens.
    """

    beta: Positive = 0.1

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the losses [P] and metrics [P]; 1 / (2 beta^2) when policy and reference agree."""
        chosen, rejected = log_ratios(policy, reference)
        target = 0.5 / self.beta
        losses = (chosen - target).square() + (rejected + target).square()
        return losses, reward_metrics(policy, self.beta * chosen, self.beta * rejected)


@dataclass(frozen=True)
class NCA(PairObjective):
    """NCA loss: `-log sigmoid(r_c) - [log sigmoid(-r_c) + log sigmoid(-r_r)] / 2` with r = beta * u.

    Noise contrastive alignment (Chen et al. 2024, arXiv 2402.05369), its form for pairs. It acts on absolute rewards,
    so that the chosen reward does not fall with the rejected one. Sums over tokens.
    """

    beta: Positive = 0.1

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the losses [P] and metrics [P]; 2 log 2 when policy and reference agree."""
        chosen, rejected = (self.beta * ratio for ratio in log_ratios(policy, reference))
        losses = -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))
        return losses, reward_metrics(policy, chosen, rejected)


@dataclass(frozen=True)
class EXO(PairObjective):
    """EXO loss: KL(Bernoulli(sigmoid(beta * delta)) || Bernoulli(1 - e)), e = `label_smoothing`.

    The reverse of DPO's KL. Ji et al. 2024 (arXiv 2402.00856, eq. 16), for pairs. e must be positive: at 0 the
    divergence is infinite. Sums over tokens.
    """

    beta: Positive = 0.1
    label_smoothing: Annotated[float, Field(gt=0, lt=0.5)] = 0.001

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the losses [P] and metrics [P]; 0 at the optimum."""
        chosen, rejected = log_ratios(policy, reference)
        logits = self.beta * (chosen - rejected)
        target = torch.logit(torch.tensor(1 - self.label_smoothing, dtype=torch.float64)).item()
        losses = bernoulli_kl(logits, torch.full_like(logits, target))
        return losses, reward_metrics(policy, self.beta * chosen, self.beta * rejected)


@dataclass(frozen=True)
class DiscoPOP(PairObjective):
    """DiscoPOP loss: `(1 - w) * -log sigmoid(l) + w * exp(-l)`, l = beta * delta, w = sigmoid(l / temperature).

    The log-ratio modulated loss discovered by a language model (Lu et al. 2024, arXiv 2406.08414, eq. 5). It is not
    convex: at the default temperature its slope at l = 0 is positive, so training starts by shrinking the margin. Sums
    over tokens.
    """

    beta: Positive = 0.1
    temperature: Positive = 0.05

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the losses [P] and metrics [P]."""
        chosen, rejected = log_ratios(policy, reference)
        logits = self.beta * (chosen - rejected)
        # w exp(-l) as one exponential: separately, exp(-l) overflows where w is 0
        exponential = capped_ratio(F.logsigmoid(logits / self.temperature) - logits)
        losses = torch.sigmoid(-logits / self.temperature) * -F.logsigmoid(logits) + exponential
        return losses, reward_metrics(policy, self.beta * chosen, self.beta * rejected)


@dataclass(frozen=True)
class RewardAware(PairObjective):
    """Reward-aware preference optimization: fit `beta * delta` to `score_scale * (s_c - s_r)`, s numeric scores.

    Sun et al. 2025 (arXiv 2502.00203); Nemotron-4 (arXiv 2406.11704). `distance` is the `squared` difference of the
    two, or the KL between the Bernoulli distributions that they are logits of, with the scores first
    (`kl_scores_policy`, NeMo's rpo_bwd_kl) or the policy first (`kl_policy_scores`, NeMo's rpo_fwd_kl). Log-ratios are
    sums over tokens; scores are the annotator's, on its own scale.
    """

    beta: Positive = 0.1
    score_scale: Positive = 1.0
    distance: Literal["squared", "kl_scores_policy", "kl_policy_scores"] = "kl_scores_policy"

    @property
    def needs_scores(self) -> bool:
        """True: the target is the difference of the annotator's scores."""
        return True

    def __call__(
        self, policy: PairLogps, reference: PairLogps | None = None, context: PairContext | None = None
    ) -> tuple[Tensor, Metrics]:
        """Return the losses [P] and metrics [P]; 0 at the optimum.

        Raises:
            ValueError: `context` has no scores.
        """
        if context is None or context.chosen_score is None or context.rejected_score is None:
            raise ValueError("reward-aware preference optimization needs a numeric score of every response")
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
