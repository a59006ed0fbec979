import pytest

from rlhf.data.format_detection import detect, find_adapter
from rlhf.data.formats import FORMATS
from rlhf.data.record_conversion import convert
from rlhf.data.records import Comparison, Demonstration, Label, Message, Prompt, Text
from rlhf.data.turns import parse_transcript
from rlhf.errors import UserError


def U(content):
    return Message("user", content)


def A(content):
    return Message("assistant", content)


def S(content):
    return Message("system", content)


HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant: {}"

CASES = [
    ("text", {"text": "x"}, Text("x")),
    ("alpaca", {"instruction": "Add", "input": "1 2", "output": "3"}, Demonstration((U("Add\n1 2"), A("3")))),
    (
        "alpaca",
        {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["q0", "a0"]]},
        Demonstration((S("s"), U("q0"), A("a0"), U("q"), A("a"))),
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        Demonstration((S("s"), U("q"), A("a"))),
    ),
    (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "c"},
            "rejected": {"from": "gpt", "value": "r"},
        },
        Comparison((U("q"),), ("c", "r")),
    ),
    ("messages", {"messages": [U("q").to_json(), A("a").to_json()]}, Demonstration((U("q"), A("a")))),
    ("messages", {"messages": [U("q").to_json(), A("a").to_json()], "label": False}, Label((U("q"),), "a", False)),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "value": "q"}]},
                {
                    "role": "assistant",
                    "content": [{"type": "reasoning", "value": "hm"}, {"type": "tool_call", "value": '{"a": 1}'}],
                },
                {"role": "tool", "content": "7"},
                A("It is 7").to_json(),
            ],
            "tools": [{"name": "f"}],
        },
        Demonstration(
            (
                S('<tools>\n[{"name": "f"}]\n</tools>'),
                U("q"),
                A('<think>\nhm\n</think>\n<tool_call>\n{"a": 1}\n</tool_call>'),
                Message("tool", "7"),
                A("It is 7"),
            )
        ),
    ),
    ("prompt_completion", {"prompt": "q", "completion": "a"}, Demonstration((U("q"), A("a")))),
    (
        "prompt_completion",
        {"prompt": [U("q").to_json()], "completion": [A("a").to_json()]},
        Demonstration((U("q"), A("a"))),
    ),
    (
        "preference",
        {"prompt": "q", "chosen": "c", "rejected": "r", "grade": "Slightly better"},
        Comparison((U("q"),), ("c", "r"), ("slightly",)),
    ),
    (
        "preference",
        {
            "prompt": "q",
            "chosen": [U("q").to_json(), A("c").to_json()],
            "rejected": [U("q").to_json(), A("r").to_json()],
        },
        Comparison((U("q"),), ("c", "r")),
    ),
    (
        "preference",
        {"chosen": [U("q").to_json(), A("c").to_json()], "rejected": [U("q").to_json(), A("r").to_json()]},
        Comparison((U("q"),), ("c", "r")),
    ),
    (
        "preference",
        {"prompt": [S("s").to_json(), U("q").to_json()], "chosen": [A("c").to_json()], "rejected": [A("r").to_json()]},
        Comparison((S("s"), U("q")), ("c", "r")),
    ),
    (
        "preference",
        {"prompt": "q", "chosen": "c", "rejected": "r", "score_chosen": 4, "score_rejected": 1},
        Comparison((U("q"),), ("c", "r"), (), (4.0, 1.0)),
    ),
    (
        "hh",
        {"chosen": HH.format("c"), "rejected": HH.format("r")},
        Comparison((U("Hi"), A("Hello"), U("Bye")), ("c", "r")),
    ),
    ("ranking", {"prompt": "q", "responses": ["a", "b", "c"]}, Comparison((U("q"),), ("a", "b", "c"))),
    (
        "ranking",
        {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [2, 1, 2], "scores": [0, 5, 0]},
        Comparison((U("q"),), ("b", "a", "c"), (None, None, "tie"), (5.0, 0.0, 0.0)),
    ),
    ("unpaired", {"prompt": "q", "completion": "a", "label": True}, Label((U("q"),), "a", True)),
    ("question_answer", {"question": "q", "answer": "a\n#### 1,2"}, Demonstration((U("q"), A("a\n#### 1,2")))),
    ("prompt", {"prompt": "q", "tags": ["unsafe"]}, Prompt((U("q"),), ("unsafe",))),
]


@pytest.mark.parametrize(("name", "raw", "record"), CASES)
def test_formats_are_detected_by_their_fields_and_read(name, raw, record):
    assert detect(raw) == name
    assert FORMATS[name](raw) == record


def test_every_format_is_tested():
    assert {name for name, _, _ in CASES} == set(FORMATS)


@pytest.mark.parametrize(
    "record",
    [
        Text("x"),
        Demonstration((U("q"), A("a"))),
        Comparison((U("q"),), ("c", "r"), ("better",), (1.0, 0.0), ("unsafe",)),
        Comparison((U("q"),), ("a", "b", "c"), ("better", "tie", None)),
        Prompt((U("q"),), ("unsafe",), "x", "1"),
        Label((U("q"),), "a", False),
    ],
)
def test_files_that_rlhf_writes_are_read_back(record):
    raw = record.to_json()
    assert FORMATS[detect(raw)](raw) == record


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("text", {"text": 3}, "text: expected a string"),
        ("text", {"text": "  "}, "text: empty"),
        ("alpaca", {"instruction": "q", "input": ""}, "output: missing"),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "q"}]}, "conversations: role: 'alien'"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages: content: a part"),
        ("preference", {"prompt": "q", "chosen": "c", "rejected": None}, "rejected: expected"),
        ("preference", {"prompt": "q", "chosen": "c", "rejected": "r", "grade": "huge"}, "grade: 'huge'"),
        ("hh", {"chosen": HH.format("c"), "rejected": "\n\nHuman: Other\n\nAssistant: r"}, "rejected: the dialogue"),
        ("hh", {"chosen": "c", "rejected": "r"}, "prompt: missing"),
        ("ranking", {"prompt": "q", "responses": ["a"]}, "at least 2"),
        ("unpaired", {"prompt": "q", "response": "a", "desirable": "maybe"}, "desirable: expected true or false"),
        ("alpaca", {"instruction": "q", "output": "a", "history": [["q0"]]}, "history: expected pairs"),
        ("messages", {"messages": "what a user says"}, "messages: expected a list of messages, got a string"),
        ("messages", {"messages": [{"role": "user", "content": [3]}]}, "messages: content: expected parts"),
        ("messages", {"messages": [{"role": "assistant", "content": "a", "weight": 0}]}, "messages: weight: 0"),
        ("messages", {"messages": [{"role": "assistant", "tool_calls": ["f"]}]}, "messages: tool_calls: expected"),
        ("ranking", {"prompt": "q", "responses": "ab"}, "responses: expected strings"),
        ("prompt", {"prompt": "q", "tags": [1]}, "tags: expected a list of strings"),
        ("prompt", {"prompt": "q", "reference": ["5"]}, "reference: expected a string or a number"),
    ],
)
def test_errors_name_the_field(name, raw, message):
    with pytest.raises(ValueError, match=message):
        FORMATS[name](raw)


def test_unknown_rows_and_formats_are_refused():
    with pytest.raises(ValueError, match="no format has the fields a, b"):
        detect({"a": 1, "b": 2})
    with pytest.raises(UserError, match="did you mean alpaca"):
        find_adapter("alpacca")
    with pytest.raises(UserError, match="no_such_module"):
        find_adapter("no_such_module:f")
    assert find_adapter("auto") is None
    assert find_adapter("rlhf.data.formats:text") is FORMATS["text"]


def test_turns_of_one_speaker_in_a_row_are_joined():
    text = "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant: d"
    assert parse_transcript(text) == (U("a\n\nb"), A("c\n\nd"))


def test_records_convert_between_types():
    comparison = Comparison((U("q"),), ("c", "r"), tags=("unsafe",))
    assert list(convert(comparison, "prompt")) == [Prompt((U("q"),), ("unsafe",))]
    assert list(convert(comparison, "demonstration")) == [Demonstration((U("q"), A("c")))]
    assert list(convert(comparison, "label")) == [Label((U("q"),), "c", True), Label((U("q"),), "r", False)]
    solved = Demonstration((U("q"), A("so\n#### 1,234")))
    assert list(convert(solved, "prompt")) == [Prompt((U("q"),), reference="1234")]
    assert list(convert(Label((U("q"),), "a", False), "demonstration")) == []
    with pytest.raises(ValueError, match="cannot be converted to a comparison"):
        convert(solved, "comparison")
