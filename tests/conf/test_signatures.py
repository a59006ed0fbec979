"""Hyperparameters that a constructor passes to its base class are its own."""

import functools
import inspect
import typing
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

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
    def __init__(self, model: Any, *, rate: Annotated[float, Field(gt=0)] = 0.5, batch_size: int = 1) -> None:
        self.given = {"rate": rate, "batch_size": batch_size}


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


class Changed(Below):
    """Class without a constructor."""

    defaults: ClassVar[Mapping[str, Any]] = {"rate": 0.25}


class Adding(Changed):
    defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 16}

    def __init__(self, model: Any, data: Any, *, more: int = 3, **hyperparameters: Any) -> None:
        super().__init__(model, **hyperparameters)
        self.given["more"] = more


class Again(Adding):
    defaults: ClassVar[Mapping[str, Any]] = {"rate": 0.125, "more": 4}


class Setting(Changed):
    defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 16}
    fixed = ("rate",)

    def __init__(self, model: Any, *, half_rate: float = 1.0, **hyperparameters: Any) -> None:
        super().__init__(model, rate=2 * half_rate, **hyperparameters)


class Naming(Adding):
    """Stage whose constructor names everything itself."""

    def __init__(self, model: Any, data: Any, *, batch_size: int = 5) -> None:
        super().__init__(model, data, batch_size=batch_size)


class BelowNaming(Naming):
    """Class without a constructor, and without defaults."""


@pytest.mark.parametrize(
    ("made", "defaults", "given"),
    [
        (Below, {"rate": 0.5, "batch_size": 1}, {"rate": 0.5, "batch_size": 1}),
        (Changed, {"rate": 0.25, "batch_size": 1}, {"rate": 0.25, "batch_size": 1}),
        (Adding, {"rate": 0.25, "batch_size": 16, "more": 3}, {"rate": 0.25, "batch_size": 16, "more": 3}),
        (Again, {"rate": 0.125, "batch_size": 16, "more": 4}, {"rate": 0.125, "batch_size": 16, "more": 4}),
        (Setting, {"batch_size": 16, "half_rate": 1.0}, {"rate": 2.0, "batch_size": 16}),
        (Naming, {"batch_size": 5}, {"rate": 0.25, "batch_size": 5, "more": 3}),
        (BelowNaming, {"batch_size": 5}, {"rate": 0.25, "batch_size": 5, "more": 3}),
    ],
)
def test_defaults_of_a_class_are_in_its_signature_and_reach_the_constructors_below(
    made: Any, defaults: dict[str, Any], given: dict[str, Any]
) -> None:
    found = parameters(made)
    assert found is not None
    hyperparameters = {name: p for name, p in found.items() if p.kind is p.KEYWORD_ONLY}
    assert {name: p.default for name, p in hyperparameters.items()} == defaults
    assert not any(p.kind is p.VAR_KEYWORD for p in found.values())
    if "rate" in found:
        assert len(check_node(made, {"rate": -1}, "stage", given=groups(made))) == 1
    assert made(*groups(made)).given == given
    changed = {name: value + 1 for name, value in defaults.items()}
    expected = {**given, **changed, **({"rate": 4.0} if made is Setting else {})}
    expected.pop("half_rate", None)
    assert made(*groups(made), **changed).given == expected


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("defaults", {"rat": 1.0}, r"Wrong.defaults: rat is not a hyperparameter .*did you mean rate"),
        ("defaults", {"model": None}, "Wrong.defaults: model is not"),
        ("defaults", {"own": 2}, "Wrong.defaults: own is not"),
        ("fixed", ("rat",), r"Wrong.fixed: rat is not a hyperparameter .*did you mean rate"),
    ],
)
def test_a_default_for_something_else_than_an_inherited_hyperparameter_is_refused(
    attribute: str, value: Any, message: str
) -> None:
    def constructor(self: Any, model: Any, *, own: int = 1, **hyperparameters: Any) -> None: ...

    with pytest.raises(TypeError, match=message):
        type("Wrong", (Below,), {attribute: value, "__init__": constructor})


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
