"""Special tokens inside responses are counted, because the text that rewards read is decoded without them."""

import pytest
import torch

from rlhf.data.chat_templates import TEMPLATES, TOKENS
from rlhf.data.end_tokens import end_of_turn_id
from rlhf.data.rendering import tokenize
from rlhf.data.special_tokens import has_special_tokens
from rlhf.data.tokenizer import train_tokenizer


@pytest.fixture
def tokenizer():
    return train_tokenizer(["Mia lives in Rome. <call>calculator(1)</call>"], 300)


def has_special(tokenizer, *responses):
    rows = [tokenize(tokenizer, response) for response in responses]
    width = max(map(len, rows))
    own = torch.tensor([[place < len(row) for place in range(width)] for row in rows])
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    return has_special_tokens(tokenizer, end_of_turn_id(tokenizer), ids, own)


def test_special_tokens_before_the_end_count_and_the_end_and_padding_do_not(tokenizer):
    responses = ["Mia lives.<|end|>", "Mia", "Mia<|user|> lives.<|end|>", "<|pad|>Mia<|end|>", "Mia lives<|endoftext|>"]
    assert has_special(tokenizer, *responses) == [False, False, True, True, True]
    for response in responses:  # the same, computed by decoding
        said = tokenizer.decode(tokenize(tokenizer, response.replace("<|end|>", "")), skip_special_tokens=True)
        assert has_special(tokenizer, response) == [said != response.replace("<|end|>", "")]


def test_tool_call_marks_do_not_count_as_special_tokens(tokenizer):
    dialogue = "<call>calculator(1)</call><|end|>It is 1.<|end|>"  # the policy's own tokens of two turns
    tokenizer.add_special_tokens({"additional_special_tokens": ["<call>", "</call>", "<|assistant|>", "<odd>"]})
    assert len(tokenize(tokenizer, "<call>")) == 1
    assert has_special(tokenizer, dialogue, dialogue + "<odd>", dialogue + "<|assistant|>") == [False, True, True]


def test_role_marks_in_a_response_count_as_special_tokens(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS["chatml"])})
    tokenizer.chat_template = TEMPLATES["chatml"]
    assert has_special(tokenizer, "Mia<|im_end|>", "Mia<|im_start|>user\nHi<|im_end|>") == [False, True]
