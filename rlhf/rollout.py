"""Sampling: prompts in, replies with their log-probabilities out."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rlhf.data.collate import collate_prompts
from rlhf.data.records import Message, Prompt
from rlhf.data.specials import with_strays
from rlhf.data.template import encode_prompt
from rlhf.errors import UserError
from rlhf.models.language_model import LanguageModel


@dataclass(frozen=True)
class Rollout:
    """Replies to B prompts, prompts padded on the left to P tokens, replies on the right to R.

    Row i answers ``prompts[i]``; with ``samples=K`` the K replies to one prompt stand in K consecutive rows.
    """

    prompts: list[Prompt]  # [B], a prompt repeated for each of its samples
    prompt_ids: Tensor  # [B, P] long
    prompt_mask: Tensor  # [B, P] bool, 1 = token
    response_ids: Tensor  # [B, R] long
    mask: Tensor  # [B, R] bool, 1 on the policy's own tokens: up to and including the end-of-turn token
    logp: Tensor  # [B, R] float, log-probability under the distribution sampled from, 0 where masked
    ended: Tensor  # [B] bool, whether the reply came to its end-of-turn token
    texts: list[str]  # [B], replies without special tokens; of several turns the last
    # Where tools are called (rlhf.tools), their answers stand among the policy's tokens: present, but not its own.
    present: Tensor | None = None  # [B, R] bool, 1 on every token of the reply; None: the same as mask
    turns: list[tuple[Message, ...]] | None = None  # [B], the assistant's and the tools' turns; None: one turn each
    strays: list[bool] | None = None  # [B], whether special tokens stand before the reply's end; None: nobody looked

    @property
    def ids(self) -> Tensor:
        """Prompt and reply in one row, [B, P+R]."""
        return torch.cat([self.prompt_ids, self.response_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """1 on the tokens of prompt and reply, [B, P+R]."""
        return torch.cat([self.prompt_mask, self.mask if self.present is None else self.present], dim=1)

    @property
    def loss_mask(self) -> Tensor:
        """1 on the policy's own tokens, [B, P+R]."""
        return torch.cat([torch.zeros_like(self.prompt_mask), self.mask], dim=1)

    @property
    def position_ids(self) -> Tensor:
        """Positions that count tokens, not padding, [B, P+R]."""
        return positions(self.attention_mask)

    @property
    def lengths(self) -> Tensor:
        """The policy's own tokens in each reply, [B]."""
        return self.mask.sum(dim=1)

    def diagnostics(self) -> dict[str, Tensor]:
        """What replies look like when a policy games its reward, each a scalar.

        ``length``: tokens; ``ended``: share that came to an end by themselves; ``repetition``: share of bigrams seen
        before in the same reply; ``distinct``: share of different replies in the batch; ``special_tokens``: share with
        a special token before their end, of replies that were sampled here. Where tools can be called: ``calls`` per
        reply, and ``call_errors``, the share of calls that were answered by an error.
        """
        pairs = self.response_ids[:, :-1] * (int(self.response_ids.max()) + 1) + self.response_ids[:, 1:]
        valid = self.mask[:, 1:] & self.mask[:, :-1]
        ordered = torch.where(valid, pairs, -1).sort(dim=1).values
        repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        return {
            "length": self.lengths.float().mean(),
            "ended": self.ended.float().mean(),
            "repetition": repeated.sum() / valid.sum().clamp(min=1),
            "distinct": torch.tensor(len(set(self.texts)) / len(self.texts), device=self.mask.device),
            **self._strays(),
            **self._calls(),
        }

    def _strays(self) -> dict[str, Tensor]:
        if self.strays is None:
            return {}
        return {"special_tokens": torch.tensor(sum(self.strays) / len(self.strays), device=self.mask.device)}

    def _calls(self) -> dict[str, Tensor]:
        if self.turns is None:
            return {}
        answers = [turn.content for turns in self.turns for turn in turns if turn.role == "tool"]
        errors = sum(answer.startswith("error") for answer in answers)
        numbers = {"calls": len(answers) / len(self.turns), "call_errors": errors / max(1, len(answers))}
        return {name: torch.tensor(value, device=self.mask.device) for name, value in numbers.items()}

    def rows(self, index: Tensor) -> "Rollout":
        """The rows named by ``index`` [N], in that order."""
        picked = index.tolist()
        return replace(
            self,
            prompts=[self.prompts[i] for i in picked],
            texts=[self.texts[i] for i in picked],
            prompt_ids=self.prompt_ids[index],
            prompt_mask=self.prompt_mask[index],
            response_ids=self.response_ids[index],
            mask=self.mask[index],
            logp=self.logp[index],
            ended=self.ended[index],
            present=None if self.present is None else self.present[index],
            turns=None if self.turns is None else [self.turns[i] for i in picked],
            strays=None if self.strays is None else [self.strays[i] for i in picked],
        )


def joined(parts: Sequence[Rollout], pad_id: int) -> Rollout:
    """The rows of several rollouts, one after the other: prompts padded on the left, replies on the right."""
    made: dict[str, Any] = {}
    for field in fields(Rollout):
        values = [getattr(part, field.name) for part in parts]
        if any(value is None for value in values):
            made[field.name] = None
        elif isinstance(values[0], list):
            made[field.name] = list(chain.from_iterable(values))
        elif values[0].ndim == 1:
            made[field.name] = torch.cat(values)
        else:
            empty, left = pad_id if field.name.endswith("_ids") else 0, field.name.startswith("prompt_")
            made[field.name] = side_by_side(values, empty, left)
    return Rollout(**made)


def side_by_side(parts: Sequence[Tensor], empty: float = 0, left: bool = False) -> Tensor:
    """Rows of several widths, [B_i, T_i] each, as [sum of B_i, max of T_i], ``empty`` beyond them or to their left."""
    width = max(part.shape[1] for part in parts)
    gaps = [width - part.shape[1] for part in parts]
    padding = [(gap, 0) if left else (0, gap) for gap in gaps]
    return torch.cat([F.pad(part, sides, value=empty) for part, sides in zip(parts, padding, strict=True)])


def positions(attention_mask: Tensor) -> Tensor:
    """[B, T] mask -> [B, T] positions that count only what is attended to; padding gets 0."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


class Sampler:
    """Ancestral sampling with a key-value cache.

    The prompt is run once for all K samples of it, and rows that have ended leave the batch. Randomness is one uniform
    number per row and step, drawn for all rows, so a reply does not depend on which other rows have ended.

    The log-probabilities returned are those of the distribution sampled from. ``top_k`` and ``top_p`` cut that
    distribution, so under them they differ from the model's own (algorithms that score the policy must then refuse).

    Args:
        max_new_tokens: Longest reply, in tokens, end-of-turn included.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Keep only the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens with at least this probability; 1 keeps all.
        samples: Replies per prompt (K).
        batch_size: Rows sampled at a time; bounds the cache's memory.
    """

    def __init__(
        self,
        max_new_tokens: Annotated[int, Field(gt=0)] = 32,
        temperature: Annotated[float, Field(ge=0)] = 1.0,
        top_k: Annotated[int, Field(ge=0)] = 0,
        top_p: Annotated[float, Field(gt=0, le=1)] = 1.0,
        samples: Annotated[int, Field(gt=0)] = 1,
        batch_size: Annotated[int, Field(gt=0)] = 512,
    ) -> None:
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.samples = samples
        self.batch_size = batch_size

    @property
    def exact(self) -> bool:
        """Whether the distribution sampled from is the model's own at this temperature."""
        return self.top_k == 0 and self.top_p == 1.0 and self.temperature > 0

    @property
    def longest(self) -> int:
        """Most tokens of its own that a reply may have."""
        return self.max_new_tokens

    def require_single_turn(self, why: str) -> None:
        """Raises UserError for a sampler whose replies are dialogues of several turns."""

    def room(self, policy: LanguageModel) -> int:
        """Most tokens that may follow a prompt, the policy's own or not."""
        return self.max_new_tokens

    @torch.no_grad()
    def sample(self, policy: LanguageModel, prompts: list[Prompt], seed: int) -> Rollout:
        """Samples K replies to each of N prompts: a Rollout of B = N * K rows, the same for the same seed."""
        encoded = self.check(policy, prompts)
        batch = collate_prompts(encoded, policy.pad_id).to(policy.device)
        ids, mask = batch.ids, batch.attention_mask
        noise = self._noise(len(prompts) * self.samples, self.max_new_tokens, seed).to(policy.device)
        response, logp = self._continue(policy, ids, mask, noise, self.samples)
        response_mask, ended = _until_end(response, policy.end_id)
        longest = int(response_mask.sum(dim=1).max())
        response, response_mask, logp = (x[:, :longest] for x in (response, response_mask, logp))
        texts = policy.tokenizer.batch_decode(
            [row[keep].tolist() for row, keep in zip(response, response_mask, strict=True)], skip_special_tokens=True
        )
        return Rollout(
            prompts=[prompt for prompt in prompts for _ in range(self.samples)],
            prompt_ids=ids.repeat_interleave(self.samples, dim=0),
            prompt_mask=mask.repeat_interleave(self.samples, dim=0),
            response_ids=torch.where(response_mask, response, policy.pad_id),
            mask=response_mask,
            logp=torch.where(response_mask, logp, 0.0),
            ended=ended,
            texts=[text.strip() for text in texts],
            strays=with_strays(policy.tokenizer, policy.end_id, response, response_mask),
        )

    def check(self, policy: LanguageModel, prompts: list[Prompt]) -> list[list[int]]:
        """The prompts in tokens. Raises UserError for one that leaves less than ``room`` of the context."""
        encoded = [encode_prompt(policy.tokenizer, prompt.messages) for prompt in prompts]
        self.check_lengths(policy, prompts, [len(ids) for ids in encoded])
        return encoded

    def check_lengths(self, policy: LanguageModel, prompts: Sequence[Prompt], lengths: Sequence[int]) -> None:
        """As ``check``, of prompts whose tokens are counted already."""
        self.check_context(policy.context_length, self.room(policy))
        limit = policy.context_length - self.room(policy)
        for prompt, length in zip(prompts, lengths, strict=True):
            if length > limit:
                raise UserError(
                    f"prompt '{prompt.messages[-1].content[:60]}' has {length} tokens; with "
                    f"rollout.max_new_tokens={self.max_new_tokens} the model's context of {policy.context_length} "
                    f"leaves {limit}: set data.max_prompt_length={limit} or a smaller rollout.max_new_tokens"
                )

    def check_context(self, context: int, room: int | None = None) -> None:
        """Raises UserError where the longest reply alone fills a context, whatever the prompts are.

        Args:
            context: Most tokens that the policy reads.
            room: As ``room`` says; by default the reply's own tokens, which are known without a policy.
        """
        room = self.longest if room is None else room
        if room >= context:
            raise UserError(
                f"rollout.max_new_tokens={self.max_new_tokens} leaves no room for a prompt: replies of up to {room} "
                f"tokens in the model's context of {context}; type a smaller one, {self.shorter(context)}"
            )

    def shorter(self, context: int) -> str:
        """What to type, or also to type, where replies fill the context."""
        return f"such as rollout.max_new_tokens={max(1, context // 2)}"

    def _noise(self, rows: int, columns: int, seed: int) -> Tensor:
        """One uniform number for every token a row may have, on the CPU so that it is the same on every device."""
        return torch.rand(rows, columns, generator=torch.Generator(device="cpu").manual_seed(seed))

    def _continue(
        self, policy: LanguageModel, ids: Tensor, mask: Tensor, noise: Tensor, samples: int
    ) -> tuple[Tensor, Tensor]:
        """Token ids and log-probabilities of what follows N rows, [N * samples, max_new_tokens] each."""
        per_chunk = max(1, self.batch_size // samples)
        chunks = [
            self._decode(policy, ids[i : i + per_chunk], mask[i : i + per_chunk], noise[i * samples :], samples)
            for i in range(0, len(ids), per_chunk)
        ]
        response, logp = (torch.cat(part) for part in zip(*chunks, strict=True))
        return response, logp

    def _decode(
        self, policy: LanguageModel, ids: Tensor, mask: Tensor, noise: Tensor, samples: int
    ) -> tuple[Tensor, Tensor]:
        """As ``_continue``, for as many rows as the cache holds."""
        rows = len(ids) * samples
        response = torch.full((rows, self.max_new_tokens), policy.end_id, device=ids.device)
        logp = torch.zeros(rows, self.max_new_tokens, device=ids.device)

        hidden, cache = policy.step(ids, mask, positions(mask), cache=None)
        if samples > 1:
            cache.batch_repeat_interleave(samples)
        hidden = hidden[:, -1].repeat_interleave(samples, dim=0)
        mask = mask.repeat_interleave(samples, dim=0)
        position = mask.sum(dim=1, keepdim=True)
        alive = torch.arange(rows, device=ids.device)  # rows still in the batch

        for t in range(self.max_new_tokens):
            log_probs = self._distribution(policy.head(hidden))
            greedy = self.temperature == 0
            token = log_probs.argmax(dim=-1) if greedy else _inverse_cdf(log_probs, noise[alive, t])
            response[alive, t] = token
            logp[alive, t] = log_probs.gather(1, token[:, None])[:, 0]

            going = token != policy.end_id
            if t + 1 == self.max_new_tokens or not going.any():
                break
            if going.sum() < 0.75 * len(going):  # dropping rows copies the cache: not for every single one
                keep = going.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                alive, token, mask, position = alive[keep], token[keep], mask[keep], position[keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            step_hidden, cache = policy.step(token[:, None], mask, position, cache)
            hidden, position = step_hidden[:, -1], position + 1
        return response, logp

    def _distribution(self, logits: Tensor) -> Tensor:
        """Log-probabilities of the distribution to sample from, [N, V] -> [N, V]."""
        logits = logits.float() / (self.temperature or 1.0)
        if self.top_k:
            kth = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.sort(descending=True)
            probability = ordered.softmax(dim=-1)
            beyond = probability.cumsum(dim=-1) - probability >= self.top_p
            logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
        return logits.log_softmax(dim=-1)


def single(sampler: Sampler) -> Sampler:
    """The same sampler with one reply per prompt."""
    one = copy(sampler)
    one.samples = 1
    return one


def _inverse_cdf(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """One token per row by inverting its cumulative distribution at ``uniform`` [N] in [0, 1)."""
    cumulative = log_probs.exp().cumsum(dim=-1)
    token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    return token.clamp(max=log_probs.shape[-1] - 1)


def _until_end(response: Tensor, end_id: int) -> tuple[Tensor, Tensor]:
    """Mask [B, R] up to and including the first end-of-turn, and whether there was one [B]."""
    is_end = response == end_id
    mask = is_end.long().cumsum(dim=1) - is_end.long() == 0
    return mask, is_end.any(dim=1)
