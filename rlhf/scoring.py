"""Rewards: one call signature, a Rollout of B replies in, one score per reply [B] out."""

import importlib
from typing import Annotated, Protocol

import torch
from pydantic import Field
from torch import Tensor

from rlhf.data.collate import collate
from rlhf.data.template import Encoded, encode_prompt, encode_response
from rlhf.data.testbed.gold import gold
from rlhf.errors import UserError
from rlhf.models.scalar import ScalarModel
from rlhf.rollout import Rollout


class Reward(Protocol):
    """What a reward is to the stages: a callable, perhaps with weights that must be moved to the device first."""

    def __call__(self, rollout: Rollout) -> Tensor:
        """Scores of the replies, [B] float, on the rollout's device."""
        ...


class GoldReward:
    """The testbed's own labeller: the true score, without error (see docs/testbed.md for its scale)."""

    def __call__(self, rollout: Rollout) -> Tensor:
        """Gold totals, [B]."""
        totals = [gold(prompt, text).total for prompt, text in zip(rollout.prompts, rollout.texts, strict=True)]
        return torch.tensor(totals, dtype=torch.float32, device=rollout.mask.device)


class ModelReward:
    """A trained reward model, read at the last token of the reply.

    A reward model with the policy's own tokenizer reads the rollout's tokens as they are; another one reads the
    reply's text in its own tokens.

    Args:
        path: Run folder or model folder of the reward model.
        batch_size: Replies scored at a time.
    """

    def __init__(self, path: str, batch_size: Annotated[int, Field(gt=0)] = 256) -> None:
        self.path = path
        self.batch_size = batch_size
        self.model = ScalarModel.load(path).eval().requires_grad_(False)

    def to(self, device: torch.device) -> "ModelReward":
        """Moves the weights to ``device``."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> Tensor:
        """Scores, [B]."""
        tokenizer = self.model.tokenizer
        encoded = []
        for prompt, text, ended in zip(rollout.prompts, rollout.texts, rollout.ended.tolist(), strict=True):
            question, reply = encode_prompt(tokenizer, prompt.messages), encode_response(tokenizer, text)
            if not ended:
                reply = reply[:-1]  # the reply was cut off: the reward model must see that it did not end
            encoded.append(Encoded(question + reply, [False] * len(question) + [True] * len(reply)))
        device = rollout.mask.device
        scores = torch.empty(len(encoded), device=device)
        by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
        for start in range(0, len(by_length), self.batch_size):
            rows = by_length[start : start + self.batch_size]
            batch = collate([encoded[i] for i in rows], self.model.pad_id).to(device)
            scores[rows] = self.model.scores(batch.ids, batch.attention_mask, batch.position_ids).float()
        return scores


class FunctionReward:
    """A rule written in Python: any function ``(prompt: Prompt, reply: str) -> float``.

    Args:
        function: Where it is, as ``package.module:name``.
    """

    def __init__(self, function: str) -> None:
        module, _, name = function.partition(":")
        try:
            self.function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"reward.function={function}: {error}; write it as package.module:function") from error

    def __call__(self, rollout: Rollout) -> Tensor:
        """The function's values, [B]."""
        pairs = zip(rollout.prompts, rollout.texts, strict=True)
        return torch.tensor([float(self.function(prompt, text)) for prompt, text in pairs], device=rollout.mask.device)
