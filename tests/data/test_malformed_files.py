"""Malformed files: one line that names file, row and fix; no row is dropped without being counted."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data import Data
from rlhf.data.chat_templates import CHAT_TEMPLATE
from rlhf.data.load_report import BadRow
from rlhf.data.records import Message
from rlhf.data.template_check import check_template
from rlhf.errors import UserError
from rlhf.storage import hub

ROWS = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(20)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def data(source: object, record: Any = "demonstration", **hyperparameters: Any) -> Data:
    return Data(record, str(source), **{"size": None, "validation": 0, "max_length": 64, **hyperparameters})


def source_error(source: object, record: Any = "demonstration", **hyperparameters: Any) -> str:
    """Return the one-line error of a source that cannot be used."""
    with pytest.raises(UserError) as caught:
        data(source, record, **hyperparameters).load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_partly_valid_json_file_is_refused(tmp_path: Path) -> None:
    half = LINES + b"".join(b"plain words %d\n" % number for number in range(20))
    said = source_error(write(tmp_path / "a.jsonl", half))
    assert "20 of 40 rows are unusable" in said and "a.jsonl, row 21: not JSON" in said and "data.max_bad" in said
    report = data(tmp_path / "a.jsonl", max_bad=0.5).load().report
    assert "40 read, 20 to train on" in str(report) and "20 dropped as unusable" in str(report)
    said = source_error(write(tmp_path / "b.json", json.dumps(ROWS).encode()[:-200] + b"plain words"))
    assert "b.json: is not JSON" in said and "line 1" in said and "name it .jsonl" in said


def test_json_lines_in_a_json_file_are_read(tmp_path: Path) -> None:
    split = data(write(tmp_path / "a.json", LINES)).load()
    assert split.train == data(write(tmp_path / "b.jsonl", LINES)).load().train and len(split.train) == 20
    assert "20 of 40 rows" in source_error(write(tmp_path / "c.json", LINES + b"no\n" * 20))
    assert "must be a list of rows, got int" in source_error(write(tmp_path / "d.json", b"5"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(LINES * 50)[:-300], "is a broken gz file, unreadable after row"),
        (gzip.compress(LINES)[:40] + b"\0" * 40, "is a broken gz file"),
        (LINES, r"is a broken gz file, unreadable after row 0 \(Not a gzipped file"),
    ],
    ids=["cut short", "overwritten", "not gz at all"],
)
def test_a_corrupt_gz_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        data(write(tmp_path / "a.jsonl.gz", content)).load()
    assert "get the file again" in str(caught.value) and "\n" not in str(caught.value)


def test_a_corrupt_parquet_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    assert "is a broken parquet file" in source_error(write(tmp_path / "a.parquet", b"PAR1 and nothing else"))


def test_text_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    said = source_error(write(tmp_path / "a.txt", "caf\u00e9\n".encode("latin1")), "text")
    assert "is not UTF-8 (byte 0xe9" in said and "iconv" in said
    report = data(write(tmp_path / "b.jsonl", LINES + b'{"prompt": "caf\xe9", "completion": "x"}\n')).load().report
    assert report.bad == [BadRow("b.jsonl, row 21", "not UTF-8 (byte 0xe9 at column 16)")]


@pytest.mark.parametrize(
    ("row", "record", "reason"),
    [
        ({"prompt": "", "completion": "a"}, "demonstration", r"turn 1 \(user\): empty"),
        ({"prompt": "q", "completion": "  "}, "demonstration", "needs an assistant turn that is not empty"),
        ({"instruction": "q", "output": ""}, "demonstration", "needs an assistant turn that is not empty"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "comparison", r"turn 1 \(user\): empty"),
        ({"prompt": ""}, "prompt", r"turn 1 \(user\): empty"),
        ({"text": " \n"}, "text", "text: empty"),
        ({"messages": []}, "demonstration", "messages: expected a string or messages, got nothing"),
        ({"messages": [{"role": "user", "content": None}]}, "demonstration", "messages: content: missing"),
        (
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": ""},
                    {"role": "user", "content": "and?"},
                    {"role": "assistant", "content": "a"},
                ]
            },
            "demonstration",
            r"turn 2 \(assistant\): empty",
        ),
    ],
)
def test_a_row_with_empty_content_is_unusable(tmp_path: Path, row: dict, record: str, reason: str) -> None:
    said = source_error(write(tmp_path / "a.jsonl", json.dumps(row).encode()), record)
    assert "1 of 1 rows are unusable" in said and "a.jsonl, row 1: " in said
    with pytest.raises(UserError, match=reason):
        data(tmp_path / "a.jsonl", record).load()


def test_empty_compared_responses_and_tool_turns_are_valid(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "chosen": "a", "rejected": ""}]
    assert len(data(write(tmp_path / "a.jsonl", json.dumps(rows[0]).encode()), "comparison").load().train) == 1
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "a"},
    ]
    split = data(write(tmp_path / "b.jsonl", json.dumps({"messages": turns}).encode())).load()
    assert split.train[0].messages[1].content == '<tool_call>\n{"name": "f"}\n</tool_call>'


def test_a_hub_id_without_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)  # restored afterwards
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", datasets.config.HF_HUB_OFFLINE)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = source_error("org/no-such-data")
    assert said.startswith("data.source=org/no-such-data: no such file, the hub is not reachable, and its cache")
    assert "the path of a local file" in said


# -- the tokenizer --------------------------------------------------------------------------------------------------


def test_chat_data_needs_a_chat_template(tmp_path: Path, tokenizer: Any) -> None:
    split = data(write(tmp_path / "a.jsonl", LINES)).load()
    tokenizer.chat_template, old = None, tokenizer.chat_template
    try:
        with pytest.raises(UserError, match="has no chat template.*type model.chat_template=chatml"):
            split.encode(tokenizer, "train")
        assert Data("text", "testbed", 4, 0, 64).load().encode(tokenizer, "train")[0]  # text needs no template
    finally:
        tokenizer.chat_template = old


REFUSES = (
    "{%- for m in messages -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Roles must alternate') }}{%- endif -%}{%- endfor -%}" + CHAT_TEMPLATE
)
LEAVES_OUT = CHAT_TEMPLATE.replace(
    "{%- for message in messages -%}", "{%- for message in messages if message.role != 'system' -%}"
)
LAST_ONLY = CHAT_TEMPLATE.replace("'<|end|>'", "('' if message.role == 'assistant' and not loop.last else '<|end|>')")
OTHER_START = CHAT_TEMPLATE.replace("'<|assistant|>' -", "'<|assistant|>I think' -")
REWRITES = CHAT_TEMPLATE.replace(
    "message['content'] +", "(message['content'] if loop.revindex < 3 else message['content'] + '!') +"
)
SYSTEM, USER, RESPONSE = Message("system", "s"), Message("user", "q"), Message("assistant", "a")


@pytest.mark.parametrize(
    ("text", "dialogue", "message"),
    [
        (LEAVES_OUT, [SYSTEM, USER, RESPONSE], "does not render the content of system turns"),
        (LAST_ONLY, [USER, RESPONSE, USER, RESPONSE], r"does not end every assistant turn with <\|end\|>"),
        (OTHER_START, [USER, RESPONSE], "begins an assistant turn with other text than its generation prompt"),
        (REWRITES, [USER, RESPONSE, USER, RESPONSE], "rewrites earlier turns"),
        ("{% for m in messages %}{{ m.content", [USER, RESPONSE], "is not a Jinja template"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused(
    tokenizer: Any, text: str, dialogue: list[Message], message: str
) -> None:
    assert text != CHAT_TEMPLATE
    tokenizer.chat_template, old = text, tokenizer.chat_template
    try:
        with pytest.raises(UserError, match=message) as caught:
            check_template(tokenizer, dialogue)
        assert "\n" not in str(caught.value) and "model.chat_template=chatml" in str(caught.value)
    finally:
        tokenizer.chat_template = old
    check_template(tokenizer, dialogue)


def test_dialogues_that_the_template_refuses_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    turns = [{"role": role, "content": "x"} for role in ("user", "user", "assistant")]
    rows = [*ROWS, {"messages": turns}]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    tokenizer.chat_template, old = REFUSES, tokenizer.chat_template
    try:
        rows_kept, report = data(path).load().encode(tokenizer, "train")
        assert len(rows_kept) == 20 and report.refused == 1
        assert (
            "1 dropped: a.jsonl, row 21: model.chat_template: cannot render a dialogue of the turns user, user"
            in str(report)
        )
        with pytest.raises(UserError, match=r"1 of 21 records .*Roles must alternate.*type model.chat_template=chatml"):
            data(path, max_bad=0.01).load().encode(tokenizer, "train")
    finally:
        tokenizer.chat_template = old
