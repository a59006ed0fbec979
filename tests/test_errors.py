"""Structured errors: rendering, renaming of config keys, several findings, transport to another process."""

import pickle
from typing import Any

import pytest

from rlhf.errors import (
    RunFailed,
    UserError,
    UserErrors,
    error_fields,
    error_from_fields,
    key,
    moved,
    override_error,
    renaming,
)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"problem": "nothing to run"}, "nothing to run"),
        ({"problem": "nothing to run", "fix": "type stage=NAME"}, "nothing to run; type stage=NAME"),
        ({"problem": "should be 1", "option": "stage.steps"}, "stage.steps: should be 1"),
        ({"problem": "no run", "option": "inputs.policy", "value": None}, "inputs.policy=null: no run"),
        ({"problem": "no run", "option": "--model", "value": "a=b"}, "--model a=b: no run"),
        ({"problem": "is empty", "option": "data.source", "value": "", "where": "sft"}, "sft: data.source=: is empty"),
        ({"problem": "bad", "fix": f"raise {key('data.max_bad')}"}, "bad; raise data.max_bad"),
    ],
)
def test_an_error_is_rendered_as_where_option_problem_fix(fields: dict[str, Any], line: str) -> None:
    assert str(UserError(**fields)) == line


@pytest.mark.parametrize(
    ("old", "new", "typed", "renamed"),
    [
        ("data", "align.data", "data.size=3", "align.data.size=3"),
        ("data", "align.data", "data", "align.data"),
        ("data", "data.parts.first", "data.source=a.data=b", "data.parts.first.source=a.data=b"),
        ("data", "align.data", "database.size=3", "database.size=3"),
        ("data", "align.data", "collect.data.size=3", "collect.data.size=3"),
        ("data", "align.data", "~data.size", "~align.data.size"),
        ("sampler", "align.sampler", "sampler=best_of_k", "sampler@align.sampler=best_of_k"),
        ("sampler", "align.sampler", "sampler=null", "align.sampler=null"),
        ("reward", "align.reward", "+reward@reward.rewards.x=model", "+reward@align.reward.rewards.x=model"),
        ("model.path", "--judge", "model.path=RUN", "--judge=RUN"),
    ],
)
def test_moved_renames_a_key_and_the_keys_below_it(old: str, new: str, typed: str, renamed: str) -> None:
    assert moved(old, new)(typed) == renamed


def test_renaming_changes_the_option_and_marked_keys_alone() -> None:
    error = UserError(f"data.size is small, {key('data.size', 3)}", f"type {key('data.size', 4)}", "data.size", 3)
    error.rename(moved("data", "a.data")).rename(moved("a.data", "--data"))
    assert str(error) == "--data.size 3: data.size is small, --data.size 3; type --data.size 4"


def test_errors_raised_inside_are_renamed_and_keep_their_cause() -> None:
    cause, error = ValueError("cause"), UserErrors([UserError("a", option="data.x"), UserError("b", key("data.y", 1))])
    with pytest.raises(UserErrors) as caught, renaming("data", "sft.data"), renaming("data", "data"):
        raise error from cause
    assert caught.value is error and error.__cause__ is cause
    assert error.lines == ("sft.data.x: a", "b; sft.data.y=1")
    with pytest.raises(ValueError, match="^data.x$"), renaming("data", "sft.data"):
        raise ValueError("data.x")


@pytest.mark.parametrize("typed, head", [("a.b=c=d", "a.b=c=d"), ("a.b=", "a.b="), ("a.b", "a.b"), ("--f=1", "--f 1")])
def test_an_error_about_an_override_names_it_as_typed(typed: str, head: str) -> None:
    assert str(override_error(typed, "is wrong", "leave it out")) == f"{head}: is wrong; leave it out"


def test_several_errors_are_one_line_each_and_equal_ones_printed_once() -> None:
    both = UserErrors([UserError("a", option="data.x"), UserErrors([UserError("b"), UserError("b")])])
    assert str(both.rename(moved("data", "sft.data"))) == "sft.data.x: a\nb"
    assert [finding.option for finding in both.findings] == ["sft.data.x", "", ""]


def test_errors_keep_their_fields_in_another_process() -> None:
    one = UserError("bad", f"type {key('data.size', 1)}", "data.size", None, "sft").rename(moved("data", "x"))
    many = UserErrors([one, UserError("c")])
    for error in (one, many, RunFailed("failed with ValueError", where="sft")):
        copied = pickle.loads(pickle.dumps(error))
        passed = error_from_fields(error_fields(error), RunFailed if isinstance(error, RunFailed) else UserError)
        assert str(copied) == str(passed) == str(error)
        assert type(copied) is type(error) and passed.exit_code == error.exit_code
        assert str(passed.rename(moved("x", "y"))) == str(error.rename(moved("x", "y")))
