"""Special tokens inside replies are counted, since the text that rewards read is decoded without them."""

import pytest
import torch

from rlhf.data.chat_templates import TEMPLATES, TOKENS
from rlhf.data.specials import with_strays
from rlhf.data.template import end_of_turn_id, tokenize
from rlhf.data.tokenizer import train_tokenizer


@pytest.fixture
def tokenizer():
    return train_tokenizer(["Mia lives in Rome. <call>calculator(1)</call>"], 300)


def strays(tokenizer, *replies):
    rows = [tokenize(tokenizer, reply) for reply in replies]
    width = max(map(len, rows))
    own = torch.tensor([[place < len(row) for place in range(width)] for row in rows])
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    return with_strays(tokenizer, end_of_turn_id(tokenizer), ids, own)


def test_what_decoding_drops_before_the_end_counts_and_the_end_and_padding_do_not(tokenizer):
    replies = ["Mia lives.<|end|>", "Mia", "Mia<|user|> lives.<|end|>", "<|pad|>Mia<|end|>", "Mia lives<|endoftext|>"]
    assert strays(tokenizer, *replies) == [False, False, True, True, True]
    for reply in replies:  # the same told by decoding
        said = tokenizer.decode(tokenize(tokenizer, reply.replace("<|end|>", "")), skip_special_tokens=True)
        assert strays(tokenizer, reply) == [said != reply.replace("<|end|>", "")]


def test_turns_with_calls_are_in_place_even_where_their_marks_are_special_tokens(tokenizer):
    dialogue = "<call>calculator(1)</call><|end|>It is 1.<|end|>"  # the policy's own tokens of two turns
    tokenizer.add_special_tokens({"additional_special_tokens": ["<call>", "</call>", "<|assistant|>", "<odd>"]})
    assert len(tokenize(tokenizer, "<call>")) == 1
    assert strays(tokenizer, dialogue, dialogue + "<odd>", dialogue + "<|assistant|>") == [False, True, True]


def test_marks_of_roles_are_out_of_place_in_a_reply(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS["chatml"])})
    tokenizer.chat_template = TEMPLATES["chatml"]
    assert strays(tokenizer, "Mia<|im_end|>", "Mia<|im_start|>user\nHi<|im_end|>") == [False, True]
