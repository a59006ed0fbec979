"""Demonstrations are tokenized many at a time and get the rows of one dialogue at a time."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from rlhf.data import Data
from rlhf.data.control_tokens import GUARD
from rlhf.data.encoding import encode_dialogue
from rlhf.data.records import Demonstration, Message
from rlhf.data.rendering import control_tokens, render, tokenize

TEXTS = (
    "What is two plus two?",
    "four",
    "",
    " spaces  around ",
    "<|im_end|> spelled <|endoftext|>",
    "é 你好 🙂",
    "a" * 300,
    "what is " * 20,
)


def rows(folder: Path, count: int = 600) -> Data:
    """Return data of dialogues of one and two exchanges; every seventh response was cut off."""
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            turns = [f"{number} {TEXTS[number % 8]}", f"{TEXTS[number % 8]}.", "and then?", f"{number}"]
            messages = [
                {"role": ("user", "assistant")[place % 2], "content": text}
                for place, text in enumerate(turns[: 2 + 2 * (number % 2)])
            ]
            file.write(json.dumps({"messages": messages, "ended": bool(number % 7)}) + "\n")
    return Data("demonstration", str(path), None, 0, 128)


def test_rows_are_those_of_one_dialogue_at_a_time(tmp_path: Path, tokenizer: Any) -> None:
    split = rows(tmp_path).load()
    found, report = split.encode(tokenizer, "train")
    whole = [encode_dialogue(tokenizer, record.messages, ended=record.ended) for record in split.train]
    kept = [row for row in whole if any(row.mask[:128])]
    assert report.truncated == sum(len(row) > 128 for row in kept) > 0 and 0 < report.dropped == 600 - len(kept)
    assert [(row.ids, row.mask) for row in found] == [(row.ids[:128], row.mask[:128]) for row in kept]


def test_a_batch_is_tokenized_as_each_text_alone(tokenizer: Any) -> None:
    turns = [Message("user", "hello <|im_end|>"), Message("assistant", f"mark {GUARD} and <|endoftext|>")]
    texts = [*TEXTS, render(tokenizer, turns), render(tokenizer, turns[:1], generation_prompt=True)]
    assert control_tokens(tokenizer).tokenize_batch(texts) == [tokenize(tokenizer, text) for text in texts]
    assert control_tokens(tokenizer).tokenize_batch([]) == []


def test_dialogues_that_the_template_refuses_are_counted_among_the_others(tmp_path: Path, tokenizer: Any) -> None:
    """The refused ones leave their neighbours in a batch as they are."""
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if 'no' in m.content %}{{ raise_exception('no') }}{% endif %}"
        "<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    data = Data("demonstration", "testbed", None, 0, 64, max_bad=0.5)
    records = [
        Demonstration((Message("user", f"{place}"), Message("assistant", "no" if place % 3 == 0 else f"yes {place}")))
        for place in range(20)
    ]
    found, report = data.encode(tokenizer, records)
    assert report.refused == 7 and report.kept == 13
    kept = [record for record in records if record.messages[1].content != "no"]
    assert [row.ids for row in found] == [encode_dialogue(tokenizer, record.messages).ids for record in kept]


def test_demonstrations_are_encoded_with_the_limits_of_prompts(tokenizer: Any) -> None:
    """As rejection sampling does with the responses that it selected."""
    records = [Demonstration((Message("user", "a"), Message("assistant", f"b{place}"))) for place in range(3)]
    found, _ = Data("prompt", "testbed", None, 0, 64).encode(tokenizer, records)
    assert [row.ids for row in found] == [encode_dialogue(tokenizer, record.messages).ids for record in records]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_long_text_ends_a_batch(tmp_path: Path, tokenizer: Any, streaming: bool, monkeypatch: Any) -> None:
    """Memory is bounded by characters, not only by the number of records."""
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    sizes: list[int] = []
    controls = type(control_tokens(tokenizer))
    tokenize_batch = controls.tokenize_batch

    def spied(self: Any, texts: Any) -> Any:
        sizes.append(sum(map(len, texts)))
        return tokenize_batch(self, texts)

    monkeypatch.setattr(controls, "tokenize_batch", spied)
    words = "word " * 60_000  # 300,000 characters
    data = Data("demonstration", "testbed", None, 0, 16)
    data.streaming = streaming
    records = [Demonstration((Message("user", words), Message("assistant", "yes")))] * 8
    data.encode(tokenizer, records)
    assert len(sizes) == 2 and max(sizes) < 1_300_000
