"""K replies per prompt, and what the best of them are worth."""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rlhf.data.batches import mix_seed
from rlhf.data.collate import collate, collate_prompts
from rlhf.data.records import Prompt
from rlhf.data.template import Encoded, encode_prompt, encode_response
from rlhf.errors import UserError
from rlhf.models.language_model import LanguageModel
from rlhf.rollout import Rollout, Sampler, joined


class BestOfK(Sampler):
    """Draws K replies to each prompt, all at one temperature or shared out over several.

    Args:
        max_new_tokens: Longest reply, in tokens, end-of-turn included.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Keep only the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens with at least this probability; 1 keeps all.
        samples: Replies per prompt (K), 2 or more.
        batch_size: Rows sampled at a time; bounds the cache's memory.
        temperatures: The K replies are shared out over these as evenly as they go, in place of ``temperature``.
    """

    def __init__(
        self,
        max_new_tokens: Annotated[int, Field(gt=0)] = 32,
        temperature: Annotated[float, Field(ge=0)] = 1.0,
        top_k: Annotated[int, Field(ge=0)] = 0,
        top_p: Annotated[float, Field(gt=0, le=1)] = 1.0,
        samples: Annotated[int, Field(ge=2)] = 4,
        batch_size: Annotated[int, Field(gt=0)] = 512,
        temperatures: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)] | None = None,
    ) -> None:
        super().__init__(max_new_tokens, temperature, top_k, top_p, samples, batch_size)
        self.check_knobs(samples, temperatures)
        self.temperatures = [float(one) for one in temperatures] if temperatures else None

    @staticmethod
    def check_knobs(samples: int = 4, temperatures: list[float] | None = None, **_: object) -> None:
        """What can be told from the knobs alone. Raises UserError for temperatures that would get no reply."""
        if temperatures and len(temperatures) > samples:
            raise UserError(
                f"{len(temperatures)} temperatures for {samples} samples leave some without a reply; "
                f"set samples={len(temperatures)} or more"
            )

    @property
    def exact(self) -> bool:
        """Whether every reply is from the model's own distribution at one temperature."""
        return super().exact and not self.temperatures

    @property
    def spread(self) -> list[float]:
        """The temperature of each of a prompt's K replies, in their order."""
        if not self.temperatures:
            return [self.temperature] * self.samples
        count = len(self.temperatures)
        return [t for i, t in enumerate(self.temperatures) for _ in range(len(range(i, self.samples, count)))]

    @torch.no_grad()
    def sample(self, policy: LanguageModel, prompts: list[Prompt], seed: int) -> Rollout:
        """As ``Sampler.sample``; the replies to a prompt stand in the order of ``spread``."""
        if not self.temperatures:
            return super().sample(policy, prompts, seed)
        parts = []
        for index, temperature in enumerate(self.temperatures):
            share = len(range(index, self.samples, len(self.temperatures)))
            one = Sampler(self.max_new_tokens, temperature, self.top_k, self.top_p, share, self.batch_size)
            parts.append(one.sample(policy, prompts, mix_seed(seed, index)))
        return interleave(parts, len(prompts), policy.pad_id)


def interleave(parts: list[Rollout], prompts: int, pad_id: int) -> Rollout:
    """Several rollouts of the same prompts as one: the rows of a prompt stand together, in the order of the parts."""
    rows: list[int] = []
    starts = [sum(len(part.texts) for part in parts[:index]) for index in range(len(parts))]
    for prompt in range(prompts):
        for start, part in zip(starts, parts, strict=True):
            share = len(part.texts) // prompts
            rows += range(start + prompt * share, start + (prompt + 1) * share)
    return joined(parts, pad_id).rows(torch.tensor(rows, device=parts[0].mask.device))


def rollout_of(policy: LanguageModel, prompts: list[Prompt], texts: list[str], ended: list[bool]) -> Rollout:
    """Written replies as a rollout, so that a reward can score them; they were not sampled here, so ``logp`` is 0."""
    tokenizer, device = policy.tokenizer, policy.device
    asked = collate_prompts([encode_prompt(tokenizer, prompt.messages) for prompt in prompts], policy.pad_id).to(device)
    replies = []
    for text, whole in zip(texts, ended, strict=True):
        # A rollout has a token in every row, so a reply without any keeps its end.
        ids = encode_response(tokenizer, text, whole) or [policy.end_id]
        replies.append(Encoded(ids, [True] * len(ids)))
    answered = collate(replies, policy.pad_id).to(device)
    return Rollout(
        prompts=prompts,
        prompt_ids=asked.ids,
        prompt_mask=asked.attention_mask,
        response_ids=answered.ids,
        mask=answered.attention_mask,
        logp=torch.zeros(answered.ids.shape, device=device),
        ended=torch.tensor(ended, device=device),
        texts=texts,
    )


def expected_best(scores: Tensor) -> dict[int, float]:
    """Mean over prompts of the expected best of k replies, k = 1, 2, 4, ... K, from K scores each, [N, K].

    The unbiased estimate over all subsets of k of the K: E[max] = sum_i C(i-1, k-1) / C(K, k) * s_(i), with s_(i) the
    i-th smallest score.
    """
    ordered = scores.double().sort(dim=1).values.mean(dim=0)
    total = scores.shape[1]
    ks = sorted({2**power for power in range(total.bit_length()) if 2**power <= total} | {total})
    best = {}
    for k in ks:
        weights = [math.comb(i - 1, k - 1) / math.comb(total, k) for i in range(1, total + 1)]
        best[k] = float(sum(weight * value for weight, value in zip(weights, ordered.tolist(), strict=True)))
    return best


def kl_bound(k: int) -> float:
    """log k - (k-1)/k: the most nats per reply that taking the best of k moves a policy (Beirami et al. 2024)."""
    return math.log(k) - (k - 1) / k


def log_law(gains: dict[int, float]) -> tuple[float, float]:
    """Slope a of the least-squares line gain = a log k through k = 1, and how much of the gains' variance it explains.

    Args:
        gains: k -> expected best of k minus the mean reply.
    """
    points = [(math.log(k), gain) for k, gain in gains.items()]
    slope = sum(x * y for x, y in points) / max(sum(x * x for x, _ in points), 1e-12)
    mean = sum(y for _, y in points) / len(points)
    spread = sum((y - mean) ** 2 for _, y in points)
    left = sum((y - slope * x) ** 2 for x, y in points)
    return slope, 1.0 - left / spread if spread > 0 else 0.0
