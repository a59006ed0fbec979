"""Knobs that a constructor hands on to the class below are its own."""

import functools
import inspect
import typing
from typing import Annotated, Any

import pytest
from pydantic import Field

from rlhf import validation
from rlhf.signatures import signature_of
from rlhf.stage import Stage


class Base:
    def __init__(self, model: Any, *, size: int, rate: Annotated[float, Field(gt=0)] = 0.5) -> None: ...


class Between(Base):
    """Has no constructor."""


class Own(Between):
    def __init__(self, model: Any, data: Any, *, size: int = 3, **knobs: Any) -> None: ...


class Last(Own):
    def __init__(self, model: Any, data: Any, reward: Any, *, more: bool = False, **knobs: Any) -> None: ...


class Closed(Own):
    def __init__(self, model: Any, *, other: int = 1) -> None: ...


class Open:
    def __init__(self, **knobs: Any) -> None: ...


@pytest.mark.parametrize(
    ("made", "knobs"),
    [
        (Base, {"size": inspect.Parameter.empty, "rate": 0.5}),
        (Between, {"size": inspect.Parameter.empty, "rate": 0.5}),
        (Own, {"size": 3, "rate": 0.5}),
        (Last, {"more": False, "size": 3, "rate": 0.5}),
        (Closed, {"other": 1}),
    ],
)
def test_a_class_has_its_knobs_and_those_it_hands_on(made: type, knobs: dict[str, Any]) -> None:
    found = signature_of(made).parameters
    assert {name: p.default for name, p in found.items() if p.kind is p.KEYWORD_ONLY} == knobs
    assert not any(p.kind is p.VAR_KEYWORD for p in found.values())


def test_groups_are_the_constructors_own_and_nobody_takes_the_rest() -> None:
    found = signature_of(Last).parameters.values()
    assert [p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD] == ["model", "data", "reward"]
    assert [p.kind for p in signature_of(Open).parameters.values()] == [inspect.Parameter.VAR_KEYWORD]


class Below(Stage):
    def __init__(self, model: Any, *, rate: Annotated[float, Field(gt=0)] = 0.5, batch_size: int = 1) -> None: ...


class Mine(Below):
    def __init__(self, model: Any, data: Any, *, batch_size: Annotated[int, Field(gt=1)] = 8, **knobs: Any) -> None: ...


def test_a_config_is_checked_against_all_of_them() -> None:
    def findings(**knobs: Any) -> list[str]:
        return validation.check_node(Mine, knobs, "stage", given=("model", "data"))

    assert findings(rate=0.1, batch_size=2) == []
    assert findings(rate=-1.0) == ["stage.rate=-1.0: should be greater than 0"]
    assert findings(batch_size=1) == ["stage.batch_size=1: should be greater than 1"]
    assert findings(rat=0.1) == ["stage.rat: unknown option (did you mean stage.rate?)"]
    assert list(validation.groups(Mine)) == ["model", "data"]


@pytest.mark.parametrize(
    ("annotation", "raises"),
    [("Absent", NameError), ("inspect.Absent", AttributeError), ("not a type", SyntaxError), ("int[str]", TypeError)],
)
def test_an_annotation_that_cannot_be_evaluated_leaves_its_knob_unchecked(
    annotation: str, raises: type[Exception]
) -> None:
    def target(size: Any, rate: float = 0.5) -> None: ...

    target.__annotations__["size"] = annotation
    with pytest.raises(raises):
        typing.get_type_hints(target)
    found = validation.parameters(target)
    assert found is not None and found["size"].annotation is Any and found["rate"].annotation is float
    assert validation.check_node(target, {"size": 3}, "stage") == []
    assert "unknown option" in validation.check_node(target, {"size": 3, "sise": 3}, "stage")[0]


def test_a_target_without_annotations_of_its_own_is_checked_by_its_names() -> None:
    target = functools.partial(Closed, other=2)
    with pytest.raises(TypeError):
        typing.get_type_hints(target)
    assert {*(validation.parameters(target) or {})} == {"model", "other"}
