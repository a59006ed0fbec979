"""Rows that would corrupt training: nulls that Arrow adds, invalid numbers, dialogues with an odd order of turns."""

import json
import math

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf.data.chat_templates import TEMPLATES
from rlhf.data.data import Data
from rlhf.data.encoding import encode_prompt
from rlhf.data.format_detection import detect
from rlhf.data.load_report import BadRow
from rlhf.data.records import Comparison, Message
from rlhf.data.sources import read_files
from rlhf.errors import UserError


def tool(name, **properties):
    kinds = {key: {"type": kind} for key, kind in properties.items()}
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": kinds}}}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = [tool("weather", city="string"), tool("convert", amount="number", unit="string")]
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"Do {number}"},
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "content": "ok"},
            {"role": "assistant", "content": "Done."},
        ],
        "tools": TOOLS,
    }
    for number, calls in enumerate(
        [
            [call("weather", city="Rome")],
            [call("convert", amount=3, unit="eur"), call("weather", city="Oslo")],
            [call("convert", amount=0, unit="")],
        ]
    )
]
PARTS = [
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "Greet."}, {"type": "text", "text": "Yo"}],
            },
        ]
    },
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Call"}]},
            {"role": "assistant", "content": [{"type": "tool_call", "tool_call": call("f", a=1)["function"]}]},
        ]
    },
]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(source, record="demonstration", **hyperparameters):
    return Data(record, str(source), **{"size": None, "validation": 0, "max_length": 512} | hyperparameters).load()


@pytest.mark.parametrize("rows", [ROWS, PARTS], ids=["tool calls", "typed content"])
def test_rows_of_an_arrow_table_equal_those_of_json_lines(tmp_path, tokenizer, monkeypatch, rows):
    """Arrow's structs have the fields of all rows; arguments that a row never had are not in its tokens."""
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    right = load(lines(tmp_path / "a.jsonl", rows))
    split = load(tmp_path / "a.parquet")
    assert split.train == right.train and "null" not in split.train[0].messages[0].content
    assert split.encode(tokenizer, "train")[0] == right.encode(tokenizer, "train")[0]
    # a data set of the hub, whole and streamed
    import datasets

    for made in (datasets.Dataset.from_list(rows), datasets.Dataset.from_list(rows).to_iterable_dataset()):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, made=made, **__: made)
        monkeypatch.setattr("rlhf.storage.hub.use_cache_if_unreachable", lambda: True)
        assert load("org/name").train == right.train


def test_meaningful_nulls_are_kept(tmp_path):
    """JSON lines keep every null; Arrow rows keep nulls of columns and of lists."""
    row = {"messages": [{"role": "user", "content": "x"}], "args": {"a": None}, "marks": [None, 1], "label": None}
    assert next(read_files([lines(tmp_path / "a.jsonl", [row])])).raw == row
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert next(read_files([tmp_path / "a.parquet"])).raw == {**row, "args": {}}
    said = {"role": "assistant", "content": "", "tool_calls": [call("f", a=None)]}
    demonstration = load(lines(tmp_path / "b.jsonl", [{"messages": [row["messages"][0], said]}])).train[0]
    assert '"arguments": {"a": null}' in demonstration.messages[1].content


def test_rows_of_several_formats_in_one_table_are_read(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            {"prompt": "c", "completion": "d"}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist([{**dict.fromkeys(("messages", "prompt", "completion")), **r} for r in rows]),
                   tmp_path / "a.parquet")  # fmt: skip
    assert load(tmp_path / "a.parquet").train == load(lines(tmp_path / "a.jsonl", rows)).train
    assert detect({"messages": None}) == "messages"  # no other format fits: its message names the missing field


def pair(**fields):
    return {"prompt": "Q", "chosen": "a", "rejected": "b", **fields}


@pytest.mark.parametrize(
    ("record", "row", "reason"),
    [
        ("comparison", pair(score_chosen=math.nan, score_rejected=0.5), "score_chosen: nan is not a finite number"),
        ("comparison", pair(chosen_score=1, rejected_score=-math.inf), "rejected_score: -inf is not a finite number"),
        ("comparison", pair(scores=[1.0, math.inf]), "scores[1]: inf is not a finite number"),
        ("comparison", pair(scores=["nan", 1]), "scores: [nan, 1.0] are not all finite numbers"),
        (
            "comparison",
            {"prompt": "Q", "responses": ["a", "b"], "ranks": [1.0, math.nan]},
            "ranks[1]: nan is not a finite number",
        ),
        ("comparison", pair(scores=[1e39, 1.0]), "scores: [1e+39, 1.0] are not all within 1e+30 of 0"),
        ("comparison", pair(scores=["a", "b"]), "scores: expected a number for each response, got ['a', 'b']"),
        (
            "comparison",
            {"prompt": "Q", "responses": ["a", "b"], "ranks": ["first", "second"]},
            "ranks: expected a number for each response, got ['first', 'second']",
        ),
        ("label", {"prompt": "Q", "response": "a", "label": math.nan}, "label: nan is not a finite number"),
        ("prompt", {"prompt": "Q", "reference": math.inf}, "reference: inf is not a finite number"),
        ("text", {"text": "a", "score": math.nan}, "score: nan is not a finite number"),
        (
            "demonstration",
            {"messages": [{"role": "assistant", "tool_calls": [call("f", a=math.nan)]}]},
            "messages[0].tool_calls[0].function.arguments.a: nan is not a finite number",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_invalid_numbers_make_a_row_unusable(tmp_path, record, row, reason, kind):
    """Such rows are counted and named by file, row and field, in every format and record type."""
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        if row.get("scores") == ["nan", 1]:
            row = {**row, "scores": ["nan", "1"]}  # a list of one type
        pq.write_table(pa.Table.from_pylist([row], schema=pa.Table.from_pylist([row]).schema), path)
    else:
        path.write_text(json.dumps(row if kind == "jsonl" else [row]))  # as Python writes them: NaN, Infinity
    with pytest.raises(UserError, match="1 of 1 rows are unusable") as found:
        load(path, record)
    assert f"first: a.{kind}, row 1: {reason}" in str(found.value)


def test_ranks_written_as_text_are_read_as_numbers(tmp_path):
    """Compared as text, "10" comes before "9"."""
    row = {"prompt": "Q", "responses": ["ten", "nine", "one"], "ranks": ["10", "9", "1"]}
    (comparison,) = load(lines(tmp_path / "a.jsonl", [row]), "comparison").train
    assert comparison.responses == ("one", "nine", "ten")


def test_a_directory_of_save_to_disk_is_refused_by_name(tmp_path):
    """Its metadata files end in .json and hold no rows."""
    datasets.Dataset.from_list([pair(), pair()]).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match=r"saved: is a directory written by save_to_disk .*to_parquet"):
        load(tmp_path / "saved", "comparison")


def test_a_number_too_large_for_a_float_is_infinite(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(pair()) + "\n" + json.dumps(pair(score_chosen=1.0)).replace("1.0", "1e999") + "\n")
    split = load(path, "comparison", max_bad=0.5)
    assert len(split.train) == 1 and split.report.bad == [
        BadRow("a.jsonl, row 2", "score_chosen: inf is not a finite number")
    ]


def test_a_user_format_cannot_build_a_record_with_invalid_numbers():
    with pytest.raises(ValueError, match="scores: "):
        Comparison((Message("user", "Q"),), ("a", "b"), scores=(math.nan, 0.0))


WELCOME = ["assistant", "user", "assistant"]
MUST_ASK = (
    "{%- if not messages or messages[0]['role'] == 'assistant' -%}{{ raise_exception('user first') }}{%- endif -%}"
)
GREETS = (
    "{%- if messages and messages[0]['role'] != 'system' -%}{{- '<|system|>Be good.<|end|>' -}}{%- endif -%}"
    + TEMPLATES["plain"]
)


def turns(*roles):
    return [{"role": role, "content": f"{role} {place}"} for place, role in enumerate(roles)]


def opened(tmp_path, count=39):
    rows = [{"messages": turns("user", "assistant")} for _ in range(count)]
    return lines(tmp_path / "a.jsonl", [*rows, {"messages": turns(*WELCOME)}])


@pytest.mark.parametrize("template", ["plain", "llama2", "zephyr", "greets"])
def test_a_dialogue_that_starts_with_the_assistant_is_trained_on(tmp_path, tokenizer, template):
    """Its first turn as well: the mask covers the assistant's tokens in both turns."""
    own = tokenizer.chat_template
    tokenizer.chat_template = GREETS if template == "greets" else TEMPLATES[template]
    try:
        split = load(opened(tmp_path))
        rows, report = split.encode(tokenizer, "train")
        assert len(rows) == 40 and report.refused == 0
        trained = tokenizer.decode([i for i, on in zip(rows[39].ids, rows[39].mask, strict=True) if on])
        both = [tokenizer.decode(ids).replace("user 1", "") for ids in (rows[39].ids, rows[0].ids)]
        assert "assistant 0" in trained and "assistant 2" in trained and "user" not in trained
        assert both[0].startswith("<|system|>Be good.") == (template == "greets")
        prompts = load(opened(tmp_path), "prompt")
        assert prompts.encode(tokenizer, "train")[0][39] == encode_prompt(tokenizer, split.train[39].messages[:2])
        side = [{"role": "user", "content": "Q"}]
        pairs = [
            {"chosen": [*side, turns("assistant")[0]], "rejected": [*side, {"role": "assistant", "content": "no"}]}
        ]
        start = turns("assistant", "user")
        pairs.append({"chosen": [*start, *pairs[0]["chosen"][1:]], "rejected": [*start, *pairs[0]["rejected"][1:]]})
        for record in ("comparison", "label", "demonstration"):
            kept, report = load(lines(tmp_path / "pairs.jsonl", pairs), record).encode(tokenizer, "train")
            assert report.refused == report.dropped == 0 and len(kept) == (4 if record == "label" else 2)
    finally:
        tokenizer.chat_template = own


@pytest.mark.parametrize(
    ("record", "streaming"), [("demonstration", False), ("demonstration", True), ("prompt", False)]
)
def test_a_dialogue_that_the_template_refuses_is_counted_and_named(tmp_path, tokenizer, record, streaming):
    own, tokenizer.chat_template = tokenizer.chat_template, MUST_ASK + TEMPLATES["plain"]
    try:
        split = load(opened(tmp_path), record, streaming=streaming)
        rows, report = split.encode(tokenizer, "train")
        assert len(rows) == 39 and report.refused == 1
        assert "1 dropped: a.jsonl, row 40: model.chat_template: cannot render a dialogue" in str(report)
        if record == "prompt":
            fitted, report, _ = split.fit_prompts(tokenizer)
            assert len(fitted.train) == 39 and report.refused == 1 and "a.jsonl, row 40" in report.first_refused
        split.data.max_bad = 0.01
        with pytest.raises(
            UserError, match=r"1 of 40 records cannot be encoded; .*raise data.max_bad \(0.01 allows 0 records\)"
        ):
            split.encode(tokenizer, "train")
    finally:
        tokenizer.chat_template = own
