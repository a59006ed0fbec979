"""Special tokens that a policy writes where none belongs: text is decoded without them, so no reward sees them."""

from functools import lru_cache

import torch
from torch import Tensor

from rlhf.data.calls import Call
from rlhf.data.records import Message
from rlhf.data.template import Tokenizer, render, tokenize


@lru_cache(maxsize=8)
def _out_of_place(tokenizer: Tokenizer, chat_template: str) -> tuple[int, ...]:
    special = set(tokenizer.all_special_ids) | {
        index for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special
    }
    # What the template itself writes into a turn of the assistant, in one that calls a tool too, belongs there.
    asked = [Message("user", "a")]
    before = tokenize(tokenizer, render(tokenizer, asked, generation_prompt=True))
    whole = tokenize(tokenizer, render(tokenizer, [*asked, Message("assistant", "1")]))
    whole += tokenizer(str(Call("calculator", "1")), add_special_tokens=False)["input_ids"]
    return tuple(sorted(special - (set(whole) - set(before))))


def with_strays(tokenizer: Tokenizer, end_id: int, ids: Tensor, own: Tensor) -> list[bool]:
    """Which replies hold a special token that decoding drops and that is no end of a turn.

    Args:
        tokenizer: The policy's.
        end_id: Ends a turn, so it belongs in a reply.
        ids: Tokens of B replies, [B, R] long.
        own: 1 on those that the policy wrote, [B, R] bool.
    """
    out_of_place = [index for index in _out_of_place(tokenizer, tokenizer.chat_template) if index != end_id]
    found = torch.isin(ids, torch.tensor(out_of_place, dtype=ids.dtype, device=ids.device)) & own
    return [bool(stray) for stray in found.any(dim=1).tolist()]
