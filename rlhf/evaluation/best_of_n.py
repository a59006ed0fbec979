"""Best of n as a policy: N responses to each prompt, the best of n of them by one score measured by others.

The cheapest strong baseline of every alignment method: it needs no training, only n times the sampling.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf.data.records import Prompt, cluster_key
from rlhf.functional.best_of_n import best_of_n_kl, best_of_n_weights, kl_bound, powers
from rlhf.functional.statistics import Difference, Estimate, estimate, paired
from rlhf.sampler.rollout import Rollout


@dataclass(frozen=True)
class BestOfN:
    """Metrics of the best of n responses of a policy, unbiased over all subsets of the N that were sampled.

    `kl` is KL(best of n || policy) per response in nats, by the ranks of the scores; `kl_bound` is its upper bound.
    `differences` are those of another policy after the best of n, paired by prompt; empty without another policy.
    """

    n: int
    metrics: dict[str, Estimate]
    kl: Estimate
    kl_bound: float
    differences: dict[str, Difference] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "BestOfN":
        """Build the result from the values of `to_json`."""
        return cls(
            raw["n"],
            {name: Estimate(**value) for name, value in raw["metrics"].items()},
            Estimate(**raw["kl"]),
            raw["kl_bound"],
            {name: Difference(**value) for name, value in raw["differences"].items()},
        )


def score_responses(rollouts: Sequence[Rollout], score: Callable[[Rollout], Tensor], samples: int) -> Tensor:
    """Return the scores of N responses to each of P prompts, [P, N] float32, on the CPU.

    Equal responses to a prompt get equal scores: those of a reward model differ by rounding between batches.
    """
    scores = torch.cat([score(rollout).float().cpu() for rollout in rollouts]).view(-1, samples)
    texts = [text for rollout in rollouts for text in rollout.texts]
    for prompt, row in enumerate(scores):
        first: dict[str, int] = {}
        own = texts[prompt * samples : (prompt + 1) * samples]
        row.copy_(row[[first.setdefault(text, index) for index, text in enumerate(own)]])
    return scores


def best_of_n(
    prompts: Sequence[Prompt],
    metrics: Mapping[str, Tensor],
    others: Mapping[str, Sequence[float]] | None = None,
) -> list[BestOfN]:
    """Return the metrics of the best of n = 1, 2, 4, ... and N responses.

    Args:
        prompts: P prompts; those that ask the same form one cluster of the standard errors.
        metrics: Name -> its value for each response, [P, N]. "reward" chooses the best response, without it "gold".
        others: Name -> P values of another policy, whose differences to the best of n are returned.
    """
    clusters: list[Hashable] = [cluster_key(prompt) for prompt in prompts]
    ranking = metrics["reward" if "reward" in metrics else "gold"]
    found = []
    for n in powers(ranking.shape[1]):
        weights = best_of_n_weights(ranking, n)
        values = {name: (weights * value.double()).sum(dim=1).tolist() for name, value in metrics.items()}
        estimates = {name: estimate(value, clusters) for name, value in values.items()}
        differences = {name: paired(values[name], other, clusters) for name, other in (others or {}).items()}
        kl = estimate(best_of_n_kl(ranking, n).tolist(), clusters)
        found.append(BestOfN(n, estimates, kl, kl_bound(n), differences))
    return found
