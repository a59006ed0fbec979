"""Rows of the benchmarks: the same tokens for both sides, from real data if present, else seeded random.

Every optimizer step trains on all rows of the case, so that steps are alike and medians mean something: a data set of
one batch is repeated. Rows are plain values that go through JSON to the workers:

    dialogues   {"ids", "mask"}                   lengths in equal steps up to Case.length
    pairs       {"prompt", "chosen", "rejected"}  natural lengths, evenly spread over the sorted data
    prompts     {"messages", "ids"}               as long as whole words allow, at most Case.prompt tokens
"""

import json
import random
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from rlhf.data.data import Data
from rlhf.data.encoding import encode_comparison, encode_dialogue, encode_prompt
from rlhf.data.records import Message
from rlhf.errors import UserError

Row = dict[str, Any]

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
ALPACA, HH = "alpaca_en_demo.json", "hh_harmless.jsonl.gz"
COMPARISONS = 400  # comparisons that the pairs are selected from
UNLIMITED = 1 << 20
SHORT = 256  # tokens in a row below which real dialogues and pairs hardly fit


def build_rows(case: Case, tokenizer: Any, folder: Path = DATA) -> tuple[list[Row], str]:
    """Return the rows of one batch, and the name of their source."""
    kind, real = case.rows_of, (folder / ALPACA).is_file() and (folder / HH).is_file()
    if kind == "prompts":
        return _prompts(case, tokenizer, folder if real else None), ALPACA if real else "testbed"
    if not real or case.length < SHORT:
        return _random_rows(case, len(tokenizer)), "random"
    if kind == "dialogues":
        return _dialogues(case, tokenizer, folder / ALPACA), ALPACA
    return _pairs(case, tokenizer, folder / HH), HH


def _lengths(case: Case) -> list[int]:
    return [max(4, case.length * (index + 1) // case.batch) for index in range(case.batch)]


def _random_rows(case: Case, vocabulary: int) -> list[Row]:
    """Return rows of random ids: a quarter of a dialogue is prompt, three quarters of a pair's row are."""
    draw = random.Random(f"{case.stage}/{case.length}/{case.batch}")

    def ids(count: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(count)]

    if case.rows_of == "dialogues":
        return [
            {"ids": ids(length), "mask": [False] * (length // 4) + [True] * (length - length // 4)}
            for length in _lengths(case)
        ]
    halves = [(3 * length // 4, max(1, length // 4)) for length in _lengths(case)]
    return [
        {"prompt": ids(prompt), "chosen": ids(response), "rejected": ids(max(1, response // 2))}
        for prompt, response in halves
    ]


def _dialogues(case: Case, tokenizer: Any, file: Path) -> list[Row]:
    """Return instructions and answers joined to dialogues, and cut at the wanted lengths.

    A row with fewer than a quarter of targets, such as one cut within a long instruction, is replaced by the next.
    """
    records = iter(Data("demonstration", str(file), None, 0, UNLIMITED).load().train)
    rows: list[Row] = []
    lengths = _lengths(case)
    while len(rows) < len(lengths):
        length, messages = lengths[len(rows)], list[Message]()
        while len(encode_dialogue(tokenizer, messages).ids) < length:
            record = next(records, None)
            if record is None:
                raise UserError(f"{file}: too few dialogues for {case.batch} rows", "type a smaller --batch")
            messages += record.messages
        row = encode_dialogue(tokenizer, messages, length)
        if sum(row.mask) >= length // 4:
            rows.append({"ids": row.ids, "mask": [bool(target) for target in row.mask]})
    return rows


def _pairs(case: Case, tokenizer: Any, file: Path) -> list[Row]:
    """Return pairs of human preferences that fit the length, evenly spread over those sorted by length."""
    records = Data("comparison", str(file), COMPARISONS, 0, UNLIMITED).load().train
    found = (encode_comparison(tokenizer, record, case.length)[0] for record in records)
    fitting = sorted((row for row in found if row is not None), key=len)
    if len(fitting) < case.batch:
        raise UserError(
            f"{file}: {len(fitting)} pairs have at most {case.length} tokens, {case.batch} are needed",
            "type a smaller --batch",
        )
    places = [(2 * index + 1) * len(fitting) // (2 * case.batch) for index in range(case.batch)]
    rows = []
    for row in map(fitting.__getitem__, places):
        better, worse, _ = row.pairs[0]
        rows.append({"prompt": row.prompt, "chosen": row.responses[better], "rejected": row.responses[worse]})
    return rows


def _prompts(case: Case, tokenizer: Any, folder: Path | None) -> list[Row]:
    """Return prompts of one user turn, cut at words; each tokenized as both sides do.

    Raises:
        UserError: Our rendering of a prompt differs from that of ``apply_chat_template``, so the sides would not read
            the same tokens.
    """
    words = cycle(_words(folder))
    rows = []
    for _ in range(case.batch):
        chosen: list[str] = []
        ids: list[int] = []
        while True:
            chosen.append(next(words))
            longer = encode_prompt(tokenizer, [Message("user", " ".join(chosen))])
            if len(longer) > case.prompt:
                break
            ids = longer
        messages = [{"role": "user", "content": " ".join(chosen[:-1])}]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        if list(rendered["input_ids"]) != ids:
            raise UserError("this tokenizer's chat template gives a prompt other tokens than ours", option="--model")
        rows.append({"messages": messages, "ids": ids})
    return rows


def _words(folder: Path | None) -> list[str]:
    if folder is None:
        return [word for text in Data("text", "testbed", 500, 0, UNLIMITED).load().texts() for word in text.split()]
    return list(_alpaca_words(folder / ALPACA))


def _alpaca_words(file: Path) -> Iterator[str]:
    for record in json.loads(file.read_text(encoding="utf-8")):
        yield from f"{record['instruction']} {record['output']}".split()
