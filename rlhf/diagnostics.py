"""Signs that a policy games its reward: measured alike in every rollout stage, and said in words when they trip.

No single number tells; these are the ones that moved first in the literature: replies that grow (Singhal et al. 2023,
arXiv 2310.03716), repeat themselves or forget to end, KL that runs away (Huang et al. 2024, arXiv 2403.17031), and,
where the true score is known, a proxy that rises while gold does not (Gao et al. 2022, arXiv 2210.10760). One is our
own: special tokens inside a reply, which no reward sees.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
from pydantic import Field
from torch import Tensor

from rlhf.data.records import Prompt, cluster_of
from rlhf.data.testbed.gold import gold
from rlhf.distributed import gather_objects, processes
from rlhf.errors import UserError
from rlhf.rollout import Rollout, joined


def gold_scores(rollout: Rollout) -> Tensor | None:
    """The true scores [B] of replies to the testbed's prompts; None for other prompts, where nobody knows them."""
    try:
        totals = [gold(prompt, text).total for prompt, text in zip(rollout.prompts, rollout.texts, strict=True)]
    except UserError:
        return None
    return torch.tensor(totals, dtype=torch.float32, device=rollout.mask.device)


def reply_metrics(rollout: Rollout, scores: Tensor | None = None, together: bool = False) -> dict[str, Tensor]:
    """What replies are like, each a scalar.

    ``length``, ``ended``, ``repetition``, ``distinct``, ``special_tokens`` as ``Rollout.diagnostics``; with ``scores``
    [B] of a reward ``score`` and ``score_std``; where gold is known ``gold``, ``gold_std``, and with scores
    ``gold_correlation``, Pearson's over the replies (0 where either does not vary). With ``together`` it is all of the
    replies of all processes, each of which must then call this.
    """
    true = gold_scores(rollout)
    if together and processes() > 1:
        rollout, scores, true = _of_all(rollout, scores, true)
    metrics = dict(rollout.diagnostics())
    if scores is not None:
        metrics |= {"score": scores.mean(), "score_std": _std(scores)}
    if true is not None:
        metrics |= {"gold": true.mean(), "gold_std": _std(true)}
        if scores is not None:
            metrics["gold_correlation"] = _correlation(scores.float(), true)
    return metrics


def proxy_gold_gap(now: Mapping[str, Any], start: Mapping[str, Any]) -> Any:
    """Return how much more the score of the reward has risen than gold has, each in standard deviations at the start.

    `(score - score_0) / score_std_0 - (gold - gold_0) / gold_std_0`: about 0 while the reward is earned, and growing
    when it is gamed. Both mappings hold what ``reply_metrics`` gives.
    """
    risen = {name: (now[name] - start[name]) / scale for name, scale in _scales(start).items()}
    return risen["score"] - risen["gold"]


def proxy_gold_gap_error(now: Mapping[str, Any], start: Mapping[str, Any], count: int, start_count: int) -> float:
    """Return the standard error of ``proxy_gold_gap``, whose two sides go over so many clusters of prompts."""
    scales = _scales(start)
    parts = ((now, count), (start, start_count))
    return math.sqrt(sum(_variance_of_gap(x, scales) / max(n, 1) for x, n in parts))


def count_clusters(prompts: Sequence[Prompt]) -> int:
    """Return how many different things the prompts of all processes ask: replies to one are no news of another."""
    return len(set().union(*gather_objects({cluster_of(prompt) for prompt in prompts})))


def _scales(start: Mapping[str, Any]) -> dict[str, float]:
    return {name: max(float(start[f"{name}_std"]), 1e-6) for name in ("score", "gold")}


def _variance_of_gap(x: Mapping[str, Any], scales: Mapping[str, float]) -> float:
    """Return the variance over replies of score less gold, each in its scale."""
    score, gold_ = (float(x[f"{name}_std"]) / scales[name] for name in ("score", "gold"))
    return max(score**2 + gold_**2 - 2 * float(x["gold_correlation"]) * score * gold_, 0.0)


def knows_gold(prompt: Prompt) -> bool:
    """Return whether the true score of replies to a prompt is known: to those of the testbed."""
    try:
        gold(prompt, "")
    except UserError:
        return False
    return True


def _of_all(
    rollout: Rollout, scores: Tensor | None, true: Tensor | None
) -> tuple[Rollout, Tensor | None, Tensor | None]:
    """What the diagnostics read of the replies of all processes; gold where all of them know it."""
    device = rollout.mask.device
    read = {name: getattr(rollout, name).cpu() for name in ("response_ids", "mask", "logp", "ended")}
    nothing = {name: getattr(rollout, name)[:, :0].cpu() for name in ("prompt_ids", "prompt_mask")}
    own = replace(rollout, prompts=[], present=None, **read, **nothing)
    numbers = [None if x is None else x.float().cpu() for x in (scores, true)]
    rollouts, *columns = zip(*gather_objects((own, *numbers)), strict=True)
    whole = joined(rollouts, pad_id=0)
    whole = replace(whole, **{name: getattr(whole, name).to(device) for name in read})
    found = [None if any(x is None for x in column) else torch.cat(column).to(device) for column in columns]
    return whole, found[0], found[1]


def _std(values: Tensor) -> Tensor:
    return values.std() if len(values) > 1 else torch.zeros_like(values.sum())


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(), b - b.mean()
    scale = a.norm() * b.norm()
    return torch.where(scale > 1e-8, (a * b).sum() / scale.clamp(min=1e-8), torch.zeros_like(scale))


Limit = Annotated[float, Field(gt=0)] | None
Share = Annotated[float, Field(ge=0, le=1)] | None


ROLLOUTS = 4  # over which the gap of score and gold is averaged: 512 replies with the default batch


class HackingWarnings(pl.Callback):
    """Says in words, once per sign and run, when the logged signs of reward hacking trip.

    Args:
        length_factor: Mean length of replies this many times that of the first rollout, or less than its inverse.
        ended: Fewer than this share of the replies come to their end by themselves.
        repetition: More than this share of the bigrams of a reply occurred before in it.
        distinct: Fewer than this share of the replies of a rollout differ from each other.
        special_tokens: More than this share of the replies hold special tokens before their end. They are dropped from
            the text that rewards, gold and judges read.
        kl: Nats per reply from the reference; in rejection sampling from the policy that sampled.
        proxy_gold_gap: Standard deviations by which the score has risen more than gold, where gold is known: the mean
            of the last `ROLLOUTS` rollouts, less two standard errors.
    """

    def __init__(
        self,
        length_factor: Annotated[float, Field(gt=1)] | None = 1.5,
        ended: Share = 0.8,
        repetition: Share = 0.2,
        distinct: Share = 0.1,
        special_tokens: Share = 0.05,
        kl: Limit = 30.0,
        proxy_gold_gap: Limit = 0.5,
    ) -> None:
        self.length_factor, self.ended, self.repetition, self.distinct = length_factor, ended, repetition, distinct
        self.special_tokens, self.kl, self.proxy_gold_gap = special_tokens, kl, proxy_gold_gap
        self.first_length: float | None = None
        self.said: list[str] = []
        self.gaps: list[list[float]] = []  # of the last rollouts: proxy_gold_gap and its standard error

    def state_dict(self) -> dict[str, Any]:
        """A resumed run compares with the same start and says nothing twice."""
        return {"first_length": self.first_length, "said": list(self.said), "gaps": [list(gap) for gap in self.gaps]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it up again."""
        self.first_length, self.said = state_dict["first_length"], list(state_dict["said"])
        self.gaps = [list(gap) for gap in state_dict.get("gaps", ())]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Looks at what the stage has logged."""
        metrics = trainer.callback_metrics
        if "length" in metrics and "ended" in metrics:
            self.look(str(getattr(pl_module, "name", "stage")), metrics, trainer.is_global_zero, ROLLOUTS)

    def look(self, stage: str, metrics: Mapping[str, Any], aloud: bool = True, rollouts: int = 1) -> None:
        """Print what trips for the first time; the gap of score and gold by its mean over so many calls."""
        now = {name: float(value) for name, value in metrics.items() if name in _READ}
        if "proxy_gold_gap" in now:
            self.gaps = [*self.gaps, [now.pop("proxy_gold_gap"), now.pop("proxy_gold_gap_se", 0.0)]][-rollouts:]
            if len(self.gaps) == rollouts:
                now |= mean_gap(self.gaps)
        if self.first_length is None:
            self.first_length = now.get("length")
        for sign, words in self.tripped(now).items():
            if sign not in self.said:
                self.said.append(sign)
                if aloud:
                    print(f"  {stage}: warning: {words} (callbacks.hacking.{sign})", flush=True)

    def tripped(self, now: Mapping[str, float]) -> dict[str, str]:
        """Sign -> what it says, for every sign beyond its limit."""
        found = {}
        first, length = self.first_length, now.get("length")
        if self.length_factor is not None and first and length is not None:
            if length > first * self.length_factor:
                found["length_factor"] = (
                    f"replies have grown from {first:.1f} to {length:.1f} tokens: the reward may pay for length; "
                    "read samples.jsonl, try a larger objective.beta"
                )
            elif length < first / self.length_factor:
                found["length_factor"] = (
                    f"replies have shrunk from {first:.1f} to {length:.1f} tokens: the reward may pay for saying "
                    "little; read samples.jsonl, try a larger objective.beta"
                )
        if self.ended is not None and now.get("ended", 1.0) < self.ended:
            found["ended"] = (
                f"only {now['ended']:.0%} of the replies end by themselves: the policy does not stop; try a larger "
                "rollout.max_new_tokens, or stage.missing_end=subtract and a larger stage.missing_end_penalty"
            )
        if self.repetition is not None and now.get("repetition", 0.0) > self.repetition:
            found["repetition"] = (
                f"{now['repetition']:.0%} of the pairs of tokens in a reply repeat: the policy loops; try a larger "
                "objective.beta, a smaller optimizer.lr"
            )
        if self.distinct is not None and now.get("distinct", 1.0) < self.distinct:
            found["distinct"] = (
                f"only {now['distinct']:.0%} of the replies differ: the policy says the same to all; try a larger "
                "objective.beta, a smaller optimizer.lr"
            )
        if self.special_tokens is not None and now.get("special_tokens", 0.0) > self.special_tokens:
            found["special_tokens"] = (
                f"{now['special_tokens']:.0%} of the replies hold special tokens before their end, which rewards, gold "
                "and judges do not see; try a larger objective.beta, a smaller optimizer.lr"
            )
        if self.kl is not None and now.get("kl", 0.0) > self.kl:
            found["kl"] = (
                f"the policy is {now['kl']:.1f} nats per reply from its reference, where the reward has seen little; "
                "try a larger objective.beta, stage.kl_budget or a smaller optimizer.lr"
            )
        gap, error = now.get("proxy_gold_gap", 0.0), now.get("proxy_gold_gap_se", 0.0)
        if self.proxy_gold_gap is not None and gap - 2 * error > self.proxy_gold_gap:
            found["proxy_gold_gap"] = (
                f"the score has risen {gap:.1f} standard deviations more than gold: the reward model is being "
                "exploited; stop earlier, a larger objective.beta, a better reward model"
            )
        return found


_READ = ("length", "ended", "repetition", "distinct", "special_tokens", "kl", "proxy_gold_gap", "proxy_gold_gap_se")


def mean_gap(gaps: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the mean of several gaps and its error: that of one, since they share the start that they go from."""
    means = [math.fsum(column) / len(gaps) for column in zip(*gaps, strict=True)]
    return {"proxy_gold_gap": means[0], "proxy_gold_gap_se": means[1]}


def look(trainer: pl.Trainer, stage: str, metrics: Mapping[str, Any]) -> None:
    """For stages that sample once and train on nothing or something else: the warnings, where they are configured."""
    for callback in getattr(trainer, "callbacks", []):
        if isinstance(callback, HackingWarnings):
            callback.look(stage, metrics, trainer.is_global_zero)
