"""Hyperparameters that a constructor passes to its base class are its own."""

import functools
import inspect
import typing
from typing import Annotated, Any

import pytest
from pydantic import Field

from rlhf.planning.validation.nodes import check_node
from rlhf.signatures import groups, merge_signature, parameters
from rlhf.stage.base import Stage


class Base:
    def __init__(self, model: Any, *, size: int, rate: Annotated[float, Field(gt=0)] = 0.5) -> None: ...


class Between(Base):
    """Class without a constructor."""


class Own(Between):
    def __init__(self, model: Any, data: Any, *, size: int = 3, **hyperparameters: Any) -> None: ...


class Last(Own):
    def __init__(self, model: Any, data: Any, reward: Any, *, more: bool = False, **hyperparameters: Any) -> None: ...


class Closed(Own):
    def __init__(self, model: Any, *, other: int = 1) -> None: ...


class Open:
    def __init__(self, **hyperparameters: Any) -> None: ...


@pytest.mark.parametrize(
    ("made", "hyperparameters"),
    [
        (Base, {"size": inspect.Parameter.empty, "rate": 0.5}),
        (Between, {"size": inspect.Parameter.empty, "rate": 0.5}),
        (Own, {"size": 3, "rate": 0.5}),
        (Last, {"more": False, "size": 3, "rate": 0.5}),
        (Closed, {"other": 1}),
    ],
)
def test_a_class_has_its_hyperparameters_and_those_it_passes_on(made: type, hyperparameters: dict[str, Any]) -> None:
    found = merge_signature(made).parameters
    assert {name: p.default for name, p in found.items() if p.kind is p.KEYWORD_ONLY} == hyperparameters
    assert not any(p.kind is p.VAR_KEYWORD for p in found.values())


def test_groups_are_those_of_the_class_itself_and_unclaimed_keywords_stay_open() -> None:
    found = merge_signature(Last).parameters.values()
    assert [p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD] == ["model", "data", "reward"]
    assert [p.kind for p in merge_signature(Open).parameters.values()] == [inspect.Parameter.VAR_KEYWORD]


class Below(Stage):
    def __init__(self, model: Any, *, rate: Annotated[float, Field(gt=0)] = 0.5, batch_size: int = 1) -> None: ...


class Mine(Below):
    def __init__(
        self, model: Any, data: Any, *, batch_size: Annotated[int, Field(gt=1)] = 8, **hyperparameters: Any
    ) -> None: ...


def test_a_config_is_validated_against_inherited_hyperparameters_too() -> None:
    def findings(**hyperparameters: Any) -> list[str]:
        return [str(found) for found in check_node(Mine, hyperparameters, "stage", given=("model", "data"))]

    assert findings(rate=0.1, batch_size=2) == []
    assert findings(rate=-1.0) == ["stage.rate=-1.0: should be greater than 0"]
    assert findings(batch_size=1) == ["stage.batch_size=1: should be greater than 1"]
    assert findings(rat=0.1) == ["stage.rat: unknown option (did you mean stage.rate?)"]
    assert list(groups(Mine)) == ["model", "data"]


@pytest.mark.parametrize(
    ("annotation", "raises"),
    [("Absent", NameError), ("inspect.Absent", AttributeError), ("not a type", SyntaxError), ("int[str]", TypeError)],
)
def test_an_annotation_that_cannot_be_evaluated_leaves_its_hyperparameter_unchecked(
    annotation: str, raises: type[Exception]
) -> None:
    def target(size: Any, rate: float = 0.5) -> None: ...

    target.__annotations__["size"] = annotation
    with pytest.raises(raises):
        typing.get_type_hints(target)
    found = parameters(target)
    assert found is not None and found["size"].annotation is Any and found["rate"].annotation is float
    assert check_node(target, {"size": 3}, "stage") == []
    assert "unknown option" in str(check_node(target, {"size": 3, "sise": 3}, "stage")[0])


def test_a_partial_target_is_validated_by_parameter_names() -> None:
    target = functools.partial(Closed, other=2)
    with pytest.raises(TypeError):
        typing.get_type_hints(target)
    assert {*(parameters(target) or {})} == {"model", "other"}
