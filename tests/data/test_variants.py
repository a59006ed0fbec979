"""Rows as public files write them (other names, roles and words for yes) are read with the same meaning."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data import Data
from rlhf.data.format_detection import detect
from rlhf.data.formats import FORMATS
from rlhf.data.records import Comparison, Demonstration, Label, Message, Prompt
from rlhf.errors import UserError


def U(content: str) -> Message:
    return Message("user", content)


def A(content: str) -> Message:
    return Message("assistant", content)


S = Message("system", "s")
Q = [{"role": "user", "content": "q"}]
QA = [*Q, {"role": "assistant", "content": "a"}]
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def read(raw: dict[str, Any]) -> Any:
    return FORMATS[detect(raw)](raw)


@pytest.mark.parametrize(
    "mark", [(True, False), (1, 0), (1.0, 0.0), ("true", "False"), ("1", "0"), ("good", "bad")], ids=str
)
@pytest.mark.parametrize(
    "row",
    [
        {"messages": QA, "label": None},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "kto_tag": None},
        {"instruction": "q", "output": "a", "kto_tag": None},
        {"prompt": "q", "completion": "a", "label": None},
    ],
    ids=["messages", "sharegpt", "alpaca", "unpaired"],
)
def test_a_label_is_a_bool_a_number_or_a_word(row: dict[str, Any], mark: tuple[Any, Any]) -> None:
    field = next(key for key, value in row.items() if value is None)
    for value, good in zip(mark, (True, False), strict=True):
        assert read({**row, field: value}) == Label((U("q"),), "a", good)


def test_a_label_without_a_verdict_gives_a_demonstration() -> None:
    assert read({"messages": QA, "label": "medicine"}) == Demonstration((U("q"), A("a")))
    assert read({"messages": QA, "label": 3}) == Demonstration((U("q"), A("a")))


@pytest.mark.parametrize(
    ("raw", "prompt"),
    [
        ({"system": "s", "question": "q", "chosen": "c", "rejected": "r"}, (S, U("q"))),
        ({"instruction": "q", "input": "x", "chosen": "c", "rejected": "r"}, (U("q\nx"),)),
        # the system message is in the responses only, or in the prompt only
        (
            {
                "prompt": "q",
                "chosen": [S.to_json(), *Q, A("c").to_json()],
                "rejected": [S.to_json(), *Q, A("r").to_json()],
            },
            (S, U("q")),
        ),
        (
            {"prompt": "q", "system": "s", "chosen": [*Q, A("c").to_json()], "rejected": [*Q, A("r").to_json()]},
            (S, U("q")),
        ),
        # UltraFeedback: prompt, both dialogues, and the chosen one again
        (
            {
                "prompt": "q",
                "messages": QA,
                "chosen": [*Q, A("c").to_json()],
                "rejected": [*Q, A("r").to_json()],
            },
            (U("q"),),
        ),
        # HH cut into prompt and responses
        ({"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "c", "rejected": "r"}, (U("q"),)),
        ({"prompt": "Human: p\n\nAssistant: o\n\nHuman: q", "chosen": "c", "rejected": "r"}, (U("p"), A("o"), U("q"))),
    ],
)
def test_pair_variants_give_the_same_comparison(raw: dict[str, Any], prompt: tuple[Message, ...]) -> None:
    assert read(raw) == Comparison(prompt, ("c", "r"))


@pytest.mark.parametrize(
    "turns",
    ["\n\nHuman: q\n\nAssistant: {}", "Human: q\n\nAssistant: {}", " \r\n\r\nHuman: q \r\n \r\nAssistant: {} \n"],
)
def test_transcripts_with_odd_white_space_are_read(turns: str) -> None:
    assert read({"chosen": turns.format("c"), "rejected": turns.format("r")}) == Comparison((U("q"),), ("c", "r"))


def test_a_prompt_that_names_a_speaker_is_not_a_transcript() -> None:
    assert read({"prompt": "Human: what is that?"}) == Prompt((U("Human: what is that?"),))


def test_tool_calls_and_thoughts_are_read() -> None:
    parts = [
        {"type": "thinking", "thinking": "t"},
        {"type": "tool_call", "value": {"name": "f", "arguments": {"x": 1}}},
    ]
    calls: list[dict[str, Any]] = [
        {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
        {"content": "", "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"content": parts[1:]},
    ]
    for turn in calls:
        assert read({"messages": [*Q, {"role": "assistant", **turn}]}) == Demonstration((U("q"), A(CALL)))
    thought = f"<think>\nt\n</think>\n{CALL}"
    turns: list[dict[str, Any]] = [
        {"content": parts},
        {"reasoning_content": "t", "content": "", "tool_calls": [parts[1]["value"]]},
    ]
    for turn in turns:
        assert read({"messages": [*Q, {"role": "assistant", **turn}]}) == Demonstration((U("q"), A(thought)))
    broken = {"function": {"name": "f", "arguments": "{x"}}  # the model's text is kept unchanged
    said = read({"messages": [*Q, {"role": "assistant", "tool_calls": [broken]}]}).messages[1].content
    assert '"arguments": "{x"' in said


def test_tools_and_system_are_both_kept() -> None:
    nothing: tuple[Any, ...] = ("[]", "", [], None)
    for tools in nothing:
        assert read({"messages": QA, "tools": tools}) == Demonstration((U("q"), A("a")))
    row = {"messages": [{"role": "developer", "content": "own"}, *QA], "system": "s", "tools": '[{"name": "f"}]'}
    head = read(row).messages[0]
    assert head == Message("system", 's\n\nown\n\n<tools>\n[{"name": "f"}]\n</tools>')


def test_other_field_names_of_alpaca_are_read() -> None:
    dolly = {"instruction": "q", "context": "x", "response": "a", "category": "c"}
    assert read(dolly) == Demonstration((U("q\nx"), A("a")))
    past = {"instruction": "q", "output": "a", "history": [U("q0").to_json(), A("a0").to_json()]}
    assert read(past) == Demonstration((U("q0"), A("a0"), U("q"), A("a")))


def test_words_for_grades_are_read() -> None:
    def grade(word: str) -> Any:
        return read({"prompt": "q", "chosen": "c", "rejected": "r", "grade": word}).grades

    assert grade("slightly_better") == ("slightly",) and grade("Much better") == ("significantly",)
    assert grade("About the same") == ("tie",) and grade("") == ()


def test_a_single_tag_and_a_numeric_reference_are_read() -> None:
    assert read({"prompt": "q", "tags": "unsafe", "reference": 5}) == Prompt((U("q"),), ("unsafe",), "5")


# -- files ----------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": "q", "completion": "a"}, {"prompt": "p\u2028x\u0085y\x0cz", "completion": "b"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n") + b"\r\n  \n"),
        ("a.jsonl", LINES.rstrip()),
        ("a.JSONL", LINES),
        ("a.jsonl", gzip.compress(LINES, mtime=0)),
        ("a.jsonl", json.dumps(ROWS).encode()),
        ("a.jsonl", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode()),
        ("a.json", LINES),
    ],
)
def test_equal_rows_in_other_file_types_are_read_equally(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    split = Data("demonstration", str(tmp_path / name), None, 0, 64).load()
    assert [record.messages[0].content for record in split.train] == ["q", "p\u2028x\u0085y\x0cz"]


def test_a_line_of_plain_text_ends_only_at_a_newline(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\u2028more\x0cof it\r\ntwo\n".encode())
    split = Data("text", str(tmp_path / "a.txt"), None, 0, 64).load()
    assert [record.text for record in split.train] == ["one\u2028more\x0cof it", "two"]


def test_one_dialogue_is_a_row_and_not_a_list_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"messages": QA}))
    assert Data("demonstration", str(tmp_path / "a.json"), None, 0, 64).load().train == [
        Demonstration((U("q"), A("a")))
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b" \n", "the file is empty"),
        ("a.jsonl", LINES.decode().encode("utf-16"), "is UTF-16, must be UTF-8; convert it: iconv -f utf-16"),
        ("a.jsonl", b"[" * 100_000, "cannot be parsed as JSON"),
        ("a.json", b'{"a": ' + b"1" * 5000 + b"}", "cannot be parsed as JSON"),
        ("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}", "row 1: cannot be parsed as JSON"),
        ("a.jsonl", b'{"prompt": "\\ud83d", "completion": "a"}', "row 1: not UTF-8 (unpaired surrogate"),
        ("a.json", b'[{"prompt": "\\ud83d", "completion": "a"}]', "row 1: not UTF-8 (unpaired surrogate"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        Data("demonstration", str(tmp_path / name), None, 0.1, 64).load()
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_glob_with_an_unreadable_match_is_refused(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "notes.csv"):
        (tmp_path / name).write_bytes(LINES)
    assert Data("demonstration", str(tmp_path / "*.jsonl"), None, 0, 64).load().report.read == 4
    with pytest.raises(UserError, match=r"matches .*notes.csv too, which cannot be read; narrow the glob"):
        Data("demonstration", str(tmp_path / "*"), None, 0, 64).load()
    with pytest.raises(UserError, match="no file matches the glob; type a path"):
        Data("demonstration", str(tmp_path / "c*"), None, 0, 64).load()


def test_bad_responses_are_excluded_and_counted(tmp_path: Path) -> None:
    rows = [{"messages": QA, "label": mark} for mark in (1, 0, "false")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = Data("demonstration", str(tmp_path / "a.jsonl"), None, 0, 64).load().report
    assert (report.read, report.train, report.unwanted) == (3, 1, 2)
    assert "2 left out as responses marked bad" in str(report)


def test_a_tie_gives_no_label_and_is_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "chosen": "c", "rejected": "r", "grade": grade} for grade in ("better", "tie")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = Data("label", str(tmp_path / "a.jsonl"), None, 0, 64).load().report
    assert (report.read, report.train, report.ties, report.unwanted) == (2, 2, 1, 0)
