import json

import pytest

from rlhf.data.records import GRADES, TIE, Comparison, Demonstration, Label, Message, Prompt, Text

USER = (Message("user", "Hi"),)


@pytest.mark.parametrize(
    "record",
    [
        Text("a\nb"),
        Demonstration((*USER, Message("assistant", "Hello"))),
        Comparison(USER, ("good", "bad")),
        Comparison(USER, ("good", "bad"), ("slightly",), (1.0, 0.25), ("unsafe",)),
        Comparison(USER, ("a", "b", "c"), ("better", None, TIE), (3.0, 2.0, 1.0)),
        Prompt(USER, ("unsafe",), "Oslo", "id/1"),
        Prompt(USER),
        Label(USER, "yes", True),
    ],
)
def test_json_round_trip(record):
    assert type(record).from_json(json.loads(json.dumps(record.to_json()))) == record


def test_the_json_of_a_pair_has_the_usual_keys():
    assert set(Comparison(USER, ("a", "b"), ("better",)).to_json()) == {"prompt", "chosen", "rejected", "grade"}


def test_ranking_expands_to_all_pairs_without_ties_and_equal_texts():
    assert Comparison(USER, ("a", "b", "c", "d")).pairs() == [
        (0, 1, None),
        (0, 2, None),
        (0, 3, None),
        (1, 2, None),
        (1, 3, None),
        (2, 3, None),
    ]
    graded = Comparison(USER, ("a", "b", "b"), (TIE, "better", "slightly"))
    assert graded.pairs() == [(0, 2, "better")]


def test_grades_run_from_weak_to_strong():
    assert GRADES == ("negligible", "slightly", "better", "significantly")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Message("bot", "x"),
        lambda: Demonstration(USER),
        lambda: Comparison(USER, ("a",)),
        lambda: Comparison((), ("a", "b")),
        lambda: Comparison(USER, ("a", "b", "c"), ("better",)),
        lambda: Comparison(USER, ("a", "b"), ("great",)),
        lambda: Comparison(USER, ("a", "b"), (), (1.0,)),
        lambda: Prompt(()),
        lambda: Prompt((*USER, Message("assistant", "x"))),
        lambda: Label(USER, " ", True),
    ],
)
def test_invalid_records_are_refused(make):
    with pytest.raises(ValueError):
        make()
