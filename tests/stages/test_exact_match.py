"""Exact-match reward: extraction of the answer, equality, and invalid settings."""

from fractions import Fraction

import pytest

from rlhf.data.data import Data
from rlhf.data.records import Message, Prompt
from rlhf.errors import UserError, moved
from rlhf.reward.answers import last_number, number
from rlhf.reward.exact_match import ExactMatch
from rlhf.testing import rollout


def prompt(reference):
    return Prompt((Message("user", "How many?"),), reference=reference)


@pytest.mark.parametrize(
    "text, value",
    [
        ("1,000", 1000),
        ("1000.0", 1000),
        ("$1,000.50", Fraction(2001, 2)),
        ("-3", -3),
        ("50%", 50),
        ("3/4", Fraction(3, 4)),
        ("7.", 7),
        (" 7 ", 7),
        (".5", Fraction(1, 2)),
        ("1/0", None),
        ("1e999999999", None),
        ("9" * 5000, None),
        ("seven", None),
        ("", None),
        ("inf", None),
        ("nan", None),
        ("$ 1,000 ", 1000),
        ("-$3", -3),
        ("3 / 4", Fraction(3, 4)),
        # Not every text of digits is a number: a policy that lists guesses has not answered.
        ("1 2", None),
        ("1,2", None),
        ("12,34", None),
        ("3 4 5", None),
    ],
)
def test_numbers_are_parsed(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    "text, found",
    [
        ("3 + 4 = 7. The answer is 7.", "7"),
        ("7-3", "3"),  # a minus between numbers is not a sign
        ("It is -3.", "-3"),
        ("That costs $1,234.50 in all.", "$1,234.50"),
        ("1,2", "2"),
        ("He has 5 figs, room x2.", "5"),
        ("48/2", "48/2"),
        ("None at all.", None),
        ("", None),
    ],
)
def test_the_last_number_is_extracted(text, found):
    assert last_number(text) == found


@pytest.mark.parametrize(
    "hyperparameters, response, reference, score",
    [
        ({}, "4 + 3 = 7. It is 7.", "7", 1.0),
        ({}, "7 figs, no, 8.", "7", 0.0),
        ({}, "It is 1,000.", "1000", 1.0),
        ({}, "I do not know.", "7", 0.0),
        ({"extract": "after_marker"}, "So 7.\n#### 7\nGood day, 12 times.", "7", 1.0),
        ({"extract": "after_marker"}, "So 7.", "7", 0.0),
        ({"extract": "after_marker"}, "#### 1, 2", "12", 0.0),
        ({"extract": "after_marker", "missing": -0.5}, "####", "7", -0.5),
        ({"extract": "regex", "pattern": r"\\boxed\{(.*?)\}"}, r"\boxed{3}, no: \boxed{7.0}", "7", 1.0),
        ({"extract": "regex", "pattern": "answer: (.*)"}, "answer:  North  pole", "north pole", 1.0),
        ({"extract": "whole"}, "Rome", "rome", 1.0),
        ({"extract": "whole"}, "It is Rome", "rome", 0.0),
        ({"extract": "whole", "numbers": False}, "7.0", "7", 0.0),
        ({"correct": 2.0, "wrong": -1.0}, "8", "7", -1.0),
        ({"correct": 2.0, "wrong": -1.0}, "7", "7", 2.0),
    ],
)
def test_exact_match_scores_by_hand(hyperparameters, response, reference, score):
    assert ExactMatch(**hyperparameters).score(prompt(reference), response) == score


def test_a_rollout_is_scored():
    given = rollout(["How many?"] * 2, ["7", "8"])
    given = type(given)(**{**given.__dict__, "prompts": [prompt("7")] * 2})
    assert ExactMatch()(given).tolist() == [1.0, 0.0]


EXAMPLE = """type for example 'reward.pattern="answer: (.*)"'"""


@pytest.mark.parametrize(
    ("hyperparameters", "line"),
    [
        ({"extract": "regex"}, f"reward.extract=regex: needs reward.pattern; {EXAMPLE}"),
        (
            {"pattern": "(.*)"},
            "reward.pattern=(.*): is read only with reward.extract=regex, not with reward.extract=last_number; "
            "type reward.extract=regex or reward.pattern=null",
        ),
        (
            {"extract": "regex", "pattern": "("},
            "reward.pattern=(: is not a regular expression (missing ), unterminated subpattern at position 0); "
            f"{EXAMPLE}",
        ),
        (
            {"extract": "regex", "pattern": "no group"},
            f"reward.pattern=no group: must have one group (in parentheses), has 0; {EXAMPLE}",
        ),
        (
            {"correct": 0.0},
            "reward.correct=0.0: must be greater than reward.wrong=0.0 and reward.missing=0.0; "
            "type for example reward.correct=1.0",
        ),
    ],
)
def test_invalid_settings_are_refused(hyperparameters, line):
    with pytest.raises(UserError) as error:
        ExactMatch(**hyperparameters)
    assert str(error.value) == line


def test_renaming_reaches_all_keys_of_a_message():
    with pytest.raises(UserError) as error:
        ExactMatch(pattern="(.*)")
    assert str(error.value.rename(moved("reward", "align.reward"))) == (
        "align.reward.pattern=(.*): is read only with align.reward.extract=regex, not with "
        "align.reward.extract=last_number; type align.reward.extract=regex or align.reward.pattern=null"
    )


def test_prompts_without_reference_are_refused_before_sampling():
    with pytest.raises(UserError, match="1 of 2 prompts have no reference.*'How many.'.*data=arithmetic"):
        ExactMatch().check([prompt("7"), prompt(None)])
    with pytest.raises(UserError, match="no reference"):
        ExactMatch().score(prompt(None), "7")


def test_gsm8k_records_are_scored(tmp_path):
    """The reference is the text after ####, and the worked answer itself scores 1 with both extractions."""
    answer = "He sold 48/2 = <<48/2=24>>24 clips.\\nTogether <<48+24=1072>>1,072.\\n#### 1,072"
    path = tmp_path / "gsm8k.jsonl"
    path.write_text(f'{{"question": "How many clips?", "answer": "{answer}"}}\n' * 2)
    (record, _) = Data("prompt", str(path), None, 0, 128).load().train
    assert record.reference == "1072"
    worked = answer.replace("\\n", "\n")
    assert ExactMatch().score(record, worked) == ExactMatch(extract="after_marker").score(record, worked) == 1.0
    assert ExactMatch().score(record, "It is 1072.") == 1.0
