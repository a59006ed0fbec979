"""Detection of special tokens that a policy generates where none belongs.

Text is decoded without special tokens, so no reward sees them.
"""

from functools import lru_cache

import torch
from torch import Tensor

from rlhf.data.control_tokens import Tokenizer, special_ids
from rlhf.data.records import Message
from rlhf.data.rendering import render, tokenize
from rlhf.data.tool_calls import Call


@lru_cache(maxsize=8)
def _unexpected_special_tokens(tokenizer: Tokenizer, chat_template: str) -> tuple[int, ...]:
    # Tokens that the template itself writes into an assistant turn, with or without a tool call, belong there.
    prompt = [Message("user", "a")]
    before = tokenize(tokenizer, render(tokenizer, prompt, generation_prompt=True))
    whole = tokenize(tokenizer, render(tokenizer, [*prompt, Message("assistant", "1")]))
    whole += tokenizer(str(Call("calculator", "1")), add_special_tokens=False)["input_ids"]
    return tuple(sorted(special_ids(tokenizer) - (set(whole) - set(before))))


def has_special_tokens(tokenizer: Tokenizer, end_id: int, ids: Tensor, own: Tensor) -> list[bool]:
    """Return for each response whether it contains a special token that decoding drops and that ends no turn.

    Args:
        tokenizer: Tokenizer of the policy.
        end_id: End-of-turn token, which belongs in a response.
        ids: Tokens of B responses, [B, R] long.
        own: 1 on the policy's own tokens, [B, R] bool.
    """
    out_of_place = [
        index for index in _unexpected_special_tokens(tokenizer, tokenizer.chat_template) if index != end_id
    ]
    found = torch.isin(ids, torch.tensor(out_of_place, dtype=ids.dtype, device=ids.device)) & own
    return [bool(mark) for mark in found.any(dim=1).tolist()]
