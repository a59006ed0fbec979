"""Rollout: the record of prompts and the responses that a policy sampled, with their log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.data.collate import TokenBatch
from rlhf.data.records import Message, Prompt

__all__ = ["Rollout", "joined", "pad_and_concatenate", "positions"]


@dataclass(frozen=True)
class Rollout:
    """Responses to B prompts; prompts are padded on the left to P tokens, responses on the right to R.

    Row i is a response to ``prompts[i]``; with ``samples=K`` the K responses to one prompt are K consecutive rows.
    """

    prompts: list[Prompt]  # [B], each prompt repeated for each of its samples
    prompt_ids: Tensor  # [B, P] long
    prompt_mask: Tensor  # [B, P] bool, 1 = token
    response_ids: Tensor  # [B, R] long
    mask: Tensor  # [B, R] bool, 1 on the policy's own tokens: up to and including the end-of-turn token
    logp: Tensor  # [B, R] float, log-probability under the sampling distribution, 0 where masked
    ended: Tensor  # [B] bool, whether the response reached its end-of-turn token
    texts: list[str]  # [B], responses without special tokens; the last of several turns
    # With tool calls (rlhf.sampler.tool_calls), tool results are attended to, but are not the policy's own tokens.
    response_attention_mask: Tensor | None = (
        None  # [B, R] bool, 1 on every token of the response; None: the same as mask
    )
    turns: list[tuple[Message, ...]] | None = None  # [B], the assistant's and the tools' turns; None: one turn each
    special_tokens: list[bool] | None = (
        None  # [B], whether special tokens precede the response's end; None: not checked
    )

    @property
    def tokens(self) -> TokenBatch:
        """Prompts and responses in one row each, [B, P+R], with the loss mask on the policy's own tokens."""
        response = self.mask if self.response_attention_mask is None else self.response_attention_mask
        return TokenBatch.of(
            torch.cat([self.prompt_ids, self.response_ids], dim=1),
            torch.cat([self.prompt_mask, response], dim=1),
            torch.cat([torch.zeros_like(self.prompt_mask), self.mask], dim=1),
        )

    @property
    def lengths(self) -> Tensor:
        """Number of the policy's own tokens in each response, [B]."""
        return self.mask.sum(dim=1)

    def diagnostics(self) -> dict[str, Tensor]:
        """Return scalar diagnostics of reward hacking.

        - ``length``: mean number of tokens;
        - ``ended``: share of responses that reached end-of-turn;
        - ``repetition``: share of bigrams that occurred before in the same response;
        - ``distinct``: share of different responses in the batch;
        - ``special_tokens``: share of responses with a special token before their end, for responses that were sampled
          here;
        - ``calls``: tool calls per response, where tools can be called;
        - ``call_errors``: share of these calls whose result is an error.
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
            **self._special_tokens(),
            **self._calls(),
        }

    def _special_tokens(self) -> dict[str, Tensor]:
        if self.special_tokens is None:
            return {}
        return {
            "special_tokens": torch.tensor(sum(self.special_tokens) / len(self.special_tokens), device=self.mask.device)
        }

    def _calls(self) -> dict[str, Tensor]:
        if self.turns is None:
            return {}
        answers = [turn.content for turns in self.turns for turn in turns if turn.role == "tool"]
        errors = sum(answer.startswith("error") for answer in answers)
        numbers = {"calls": len(answers) / len(self.turns), "call_errors": errors / max(1, len(answers))}
        return {name: torch.tensor(value, device=self.mask.device) for name, value in numbers.items()}

    def rows(self, index: Tensor) -> "Rollout":
        """Return the rows with these indices [N], in that order."""
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
            response_attention_mask=None
            if self.response_attention_mask is None
            else self.response_attention_mask[index],
            turns=None if self.turns is None else [self.turns[i] for i in picked],
            special_tokens=None if self.special_tokens is None else [self.special_tokens[i] for i in picked],
        )


def joined(parts: Sequence[Rollout], pad_id: int) -> Rollout:
    """Concatenate the rows of several rollouts; prompts are padded on the left, responses on the right."""
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
            made[field.name] = pad_and_concatenate(values, empty, left)
    return Rollout(**made)


def pad_and_concatenate(parts: Sequence[Tensor], empty: float = 0, left: bool = False) -> Tensor:
    """Concatenate rows of several widths, [B_i, T_i] each, to [sum of B_i, max of T_i].

    Shorter rows are padded with ``empty``, on the right or, with ``left``, on the left.
    """
    width = max(part.shape[1] for part in parts)
    gaps = [width - part.shape[1] for part in parts]
    padding = [(gap, 0) if left else (0, gap) for gap in gaps]
    return torch.cat([F.pad(part, sides, value=empty) for part, sides in zip(parts, padding, strict=True)])


def positions(attention_mask: Tensor) -> Tensor:
    """Return positions [B, T] that count only attended tokens of a mask [B, T]; padding gets 0."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
