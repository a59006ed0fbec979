"""Signs of reward hacking: diagnostics shared by all rollout stages, and warnings when one exceeds its limit.

No single number is conclusive; these moved first in the literature: responses that grow (Singhal et al. 2023, arXiv
2310.03716), repeat themselves or do not end, KL that grows without bound (Huang et al. 2024, arXiv 2403.17031), and,
where the true score is known, a proxy that rises while gold does not (Gao et al. 2022, arXiv 2210.10760). One is not
from the literature: special tokens inside a response, which no reward sees.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
from pydantic import Field
from torch import Tensor

from rlhf.data.records import Prompt, cluster_key
from rlhf.data.testbed.gold import gold
from rlhf.errors import UserError
from rlhf.functional.distributed import gather_objects, world_size
from rlhf.sampler.rollout import Rollout, joined


def gold_scores(rollout: Rollout) -> Tensor | None:
    """Return the true scores [B] of responses to the testbed's prompts; None for other prompts."""
    try:
        totals = [gold(prompt, text).total for prompt, text in zip(rollout.prompts, rollout.texts, strict=True)]
    except UserError:
        return None
    return torch.tensor(totals, dtype=torch.float32, device=rollout.mask.device)


def response_metrics(rollout: Rollout, scores: Tensor | None = None, together: bool = False) -> dict[str, Tensor]:
    """Return diagnostics of responses, each a scalar.

    ``length``, ``ended``, ``repetition``, ``distinct``, ``special_tokens`` as ``Rollout.diagnostics``; with ``scores``
    ``score`` and ``score_std``; where gold is known ``gold``, ``gold_std``, and with scores ``gold_correlation``,
    Pearson's over the responses (0 where either does not vary).

    Args:
        rollout: The responses.
        scores: Scores of a reward, [B].
        together: Whether the diagnostics cover the responses of all ranks; every rank must then call this function.
    """
    true = gold_scores(rollout)
    if together and world_size() > 1:
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
    """Return how much more the reward's score has risen than gold, each in standard deviations at the start.

    `(score - score_0) / score_std_0 - (gold - gold_0) / gold_std_0`: about 0 while the reward is earned, and growing
    when it is gamed. Both mappings hold metrics of ``response_metrics``.
    """
    risen = {name: (now[name] - start[name]) / scale for name, scale in _scales(start).items()}
    return risen["score"] - risen["gold"]


def proxy_gold_gap_error(now: Mapping[str, Any], start: Mapping[str, Any], count: int, start_count: int) -> float:
    """Return the standard error of ``proxy_gold_gap``.

    Args:
        now: Metrics of ``response_metrics``.
        start: The same, at the start.
        count: Clusters of prompts of ``now``.
        start_count: Clusters of prompts of ``start``.
    """
    scales = _scales(start)
    parts = ((now, count), (start, start_count))
    return math.sqrt(sum(_variance_of_gap(x, scales) / max(n, 1) for x, n in parts))


def count_clusters(prompts: Sequence[Prompt]) -> int:
    """Return the number of clusters among the prompts of all ranks.

    Prompts of one cluster ask the same, so that responses to them are not independent.
    """
    return len(set().union(*gather_objects({cluster_key(prompt) for prompt in prompts})))


def _scales(start: Mapping[str, Any]) -> dict[str, float]:
    return {name: max(float(start[f"{name}_std"]), 1e-6) for name in ("score", "gold")}


def _variance_of_gap(x: Mapping[str, Any], scales: Mapping[str, float]) -> float:
    """Return the variance over responses of score minus gold, each divided by its scale."""
    score, gold_ = (float(x[f"{name}_std"]) / scales[name] for name in ("score", "gold"))
    return max(score**2 + gold_**2 - 2 * float(x["gold_correlation"]) * score * gold_, 0.0)


def has_gold(prompt: Prompt) -> bool:
    """Return whether the true score of responses to a prompt is known, as it is for those of the testbed."""
    try:
        gold(prompt, "")
    except UserError:
        return False
    return True


def _of_all(
    rollout: Rollout, scores: Tensor | None, true: Tensor | None
) -> tuple[Rollout, Tensor | None, Tensor | None]:
    """Return the rollout, scores and gold of all ranks, with the fields that the diagnostics read.

    Scores and gold are None unless every rank has them.
    """
    device = rollout.mask.device
    read = {name: getattr(rollout, name).cpu() for name in ("response_ids", "mask", "logp", "ended")}
    nothing = {name: getattr(rollout, name)[:, :0].cpu() for name in ("prompt_ids", "prompt_mask")}
    own = replace(rollout, prompts=[], response_attention_mask=None, **read, **nothing)
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


ROLLOUTS = 4  # rollouts over which proxy_gold_gap is averaged: 512 responses with the default batch size


class HackingWarnings(pl.Callback):
    """Callback that warns, once per sign and run, when a logged sign of reward hacking exceeds its limit.

    Args:
        length_factor: Limit on the mean length relative to the first rollout's; its inverse is the lower limit.
        ended: Lower limit on the share of responses that end with EOS.
        repetition: Limit on the share of a response's bigrams that occurred before in it.
        distinct: Lower limit on the share of a rollout's responses that differ from each other.
        special_tokens: Limit on the share of responses with special tokens before their end. Such tokens are dropped
            from the text that rewards, gold and judges read.
        kl: Limit in nats per response from the reference; in rejection sampling from the policy that sampled.
        proxy_gold_gap: Limit on ``proxy_gold_gap`` in standard deviations, where gold is known: the mean of the last
            `ROLLOUTS` rollouts minus two standard errors.
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
        self.warned: list[str] = []
        self.gaps: list[list[float]] = []  # proxy_gold_gap and its standard error, of the last rollouts

    def state_dict(self) -> dict[str, Any]:
        """Return the state that makes a resumed run compare with the same start and repeat no warning."""
        return {"first_length": self.first_length, "said": list(self.warned), "gaps": [list(gap) for gap in self.gaps]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""
        self.first_length, self.warned = state_dict["first_length"], list(state_dict["said"])
        self.gaps = [list(gap) for gap in state_dict.get("gaps", ())]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Check the metrics that the stage has logged."""
        metrics = trainer.callback_metrics
        if "length" in metrics and "ended" in metrics:
            self.look(str(getattr(pl_module, "name", "stage")), metrics, trainer.is_global_zero, ROLLOUTS)

    def look(self, stage: str, metrics: Mapping[str, Any], aloud: bool = True, rollouts: int = 1) -> None:
        """Print a warning for each sign that exceeds its limit for the first time.

        Args:
            stage: Name of the stage, for the message.
            metrics: Metrics as ``response_metrics`` names them, and ``kl``.
            aloud: Whether to print; other ranks only record the warning.
            rollouts: Calls over which ``proxy_gold_gap`` is averaged before it is checked.
        """
        now = {name: float(value) for name, value in metrics.items() if name in _READ}
        if "proxy_gold_gap" in now:
            self.gaps = [*self.gaps, [now.pop("proxy_gold_gap"), now.pop("proxy_gold_gap_se", 0.0)]][-rollouts:]
            if len(self.gaps) == rollouts:
                now |= mean_gap(self.gaps)
        if self.first_length is None:
            self.first_length = now.get("length")
        for sign, words in self.tripped(now).items():
            if sign not in self.warned:
                self.warned.append(sign)
                if aloud:
                    print(f"  {stage}: warning: {words} (callbacks.hacking.{sign})", flush=True)

    def tripped(self, now: Mapping[str, float]) -> dict[str, str]:
        """Return sign -> warning, for every sign beyond its limit."""
        found = {}
        first, length = self.first_length, now.get("length")
        if self.length_factor is not None and first and length is not None:
            if length > first * self.length_factor:
                found["length_factor"] = (
                    f"responses have grown from {first:.1f} to {length:.1f} tokens: the reward may favour length; "
                    "read samples.jsonl, try a larger objective.beta"
                )
            elif length < first / self.length_factor:
                found["length_factor"] = (
                    f"responses have shrunk from {first:.1f} to {length:.1f} tokens: the reward may favour short "
                    "responses; read samples.jsonl, try a larger objective.beta"
                )
        if self.ended is not None and now.get("ended", 1.0) < self.ended:
            found["ended"] = (
                f"only {now['ended']:.0%} of the responses end with EOS before their limit of tokens; try a larger "
                "sampler.max_new_tokens, or stage.missing_eos=subtract and a larger stage.missing_eos_penalty"
            )
        if self.repetition is not None and now.get("repetition", 0.0) > self.repetition:
            found["repetition"] = (
                f"{now['repetition']:.0%} of the pairs of tokens in a response occurred before in it; try a larger "
                "objective.beta or a smaller optimizer.lr"
            )
        if self.distinct is not None and now.get("distinct", 1.0) < self.distinct:
            found["distinct"] = (
                f"only {now['distinct']:.0%} of the responses differ from each other; try a larger "
                "objective.beta or a smaller optimizer.lr"
            )
        if self.special_tokens is not None and now.get("special_tokens", 0.0) > self.special_tokens:
            found["special_tokens"] = (
                f"{now['special_tokens']:.0%} of the responses have special tokens before their end, which rewards, "
                "gold and judges do not read; try a larger objective.beta or a smaller optimizer.lr"
            )
        if self.kl is not None and now.get("kl", 0.0) > self.kl:
            found["kl"] = (
                f"the policy is {now['kl']:.1f} nats per response from its reference, where the reward was "
                "trained on few responses; try a larger objective.beta, stage.kl_budget or a smaller optimizer.lr"
            )
        gap, error = now.get("proxy_gold_gap", 0.0), now.get("proxy_gold_gap_se", 0.0)
        if self.proxy_gold_gap is not None and gap - 2 * error > self.proxy_gold_gap:
            found["proxy_gold_gap"] = (
                f"the score has risen {gap:.1f} standard deviations more than gold: the policy exploits the "
                "reward model; try fewer steps, a larger objective.beta or a better reward model"
            )
        return found


_READ = ("length", "ended", "repetition", "distinct", "special_tokens", "kl", "proxy_gold_gap", "proxy_gold_gap_se")


def mean_gap(gaps: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the mean of several gaps and its standard error.

    The error is the mean of their errors, not smaller, because the gaps share the start that they are measured from.
    """
    means = [math.fsum(column) / len(gaps) for column in zip(*gaps, strict=True)]
    return {"proxy_gold_gap": means[0], "proxy_gold_gap_se": means[1]}


def look(trainer: pl.Trainer, stage: str, metrics: Mapping[str, Any]) -> None:
    """Check metrics of stages that sample only once, if the trainer has ``HackingWarnings``."""
    for callback in getattr(trainer, "callbacks", []):
        if isinstance(callback, HackingWarnings):
            callback.look(stage, metrics, trainer.is_global_zero)
