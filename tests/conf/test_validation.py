"""Configs are validated against constructors: every finding is one line that the user can act on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from omegaconf import OmegaConf
from pydantic import Field

from rlhf.data.data import Data
from rlhf.data.mixture import Mixture
from rlhf.errors import UserError, key
from rlhf.objective import PairObjective, TokenObjective
from rlhf.planning import instantiate
from rlhf.planning.step_config import name_in_step
from rlhf.planning.validation.config import validate_config
from rlhf.planning.validation.nodes import check_node
from rlhf.runs.fingerprint import data_digests

HERE = __name__


@dataclass(frozen=True)
class Loss(PairObjective):
    """Loss with one hyperparameter of each kind."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    kind: Literal["sigmoid", "hinge"] = "sigmoid"
    steps: int = 1
    limit: float | None = None
    flag: bool = False
    shape: tuple[int, int] = (1, 2)
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}")

    def __call__(self, policy: Any, reference: Any = None, context: Any = None) -> Any:
        return policy, {}


class Stage:
    """Stage whose positional parameters are groups and whose keyword parameters are hyperparameters."""

    def __init__(self, model: Any, objective: PairObjective, reward: Any = None, *, size: int) -> None:
        pass


class TokenStage:
    """Stage that accepts another kind of objective."""

    def __init__(self, model: Any, objective: TokenObjective) -> None:
        pass


class Inner:
    """Class built from a nested node."""

    def __init__(self, width: Annotated[int, Field(gt=0)]) -> None:
        pass


class Outer:
    """Class that holds another object, whose annotation is not that of a plain value."""

    def __init__(self, inner: Inner, anything: Any = None) -> None:
        pass


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets are named by module, and a test module has no importable name of its own."""
    real = instantiate.get_object
    names = {c.__name__: c for c in (Loss, Stage, TokenStage, Inner, Outer)}
    monkeypatch.setattr(instantiate, "get_object", lambda name: names.get(name) or real(name))


def findings(config: dict[str, Any], step: str = "") -> list[str]:
    try:
        validate_config(OmegaConf.create(config), step)
    except UserError as e:
        return str(e).splitlines()
    return []


def config(stage: dict[str, Any] | None = None, **groups: Any) -> dict[str, Any]:
    own = {"_target_": "Stage", "size": 1, **(stage or {})}
    return {"model": None, "objective": {"_target_": "Loss"}, "stage": own, **groups}


@pytest.mark.parametrize(
    ("values", "finding"),
    [
        ({}, None),
        ({"limit": None, "shape": [3, 4], "beta": 1, "kind": "hinge"}, None),
        ({"betta": 1}, "objective.betta: unknown option (did you mean objective.beta?)"),
        ({"beta": -1}, "objective.beta=-1: should be greater than 0"),
        ({"beta": 1e300}, "objective.beta=1e+300: is too large for a float32; type a smaller number"),
        ({"beta": 1e-320}, "objective.beta=1e-320: is too small for a float32; type 0 or a larger number"),
        ({"beta": 1e-37}, None),
        ({"beta": None}, "objective.beta=null: should be a valid number"),
        ({"beta": "0.1"}, "objective.beta=0.1: should be of type float, not str"),
        ({"kind": "sigmod"}, "objective.kind=sigmod: should be 'sigmoid' or 'hinge'"),
        ({"steps": 0.5}, "objective.steps=0.5: should be a valid integer, got a number with a fractional part"),
        ({"steps": 2.0}, "objective.steps=2.0: should be of type int, not float"),
        ({"flag": "maybe"}, "objective.flag=maybe: should be a valid boolean, unable to interpret input"),
        (
            {"shape": [1, 2.5]},
            "objective.shape[1]=[1, 2.5]: should be a valid integer, got a number with a fractional part",
        ),
        ({"low": 2.0}, "objective: low=2.0 is above high=1.0"),
        ({"beta": "???"}, "objective.beta: has no value; type objective.beta=..."),
        ({"beta": "${nowhere}"}, "objective.beta: Interpolation key 'nowhere' not found"),
    ],
)
def test_values_are_validated_against_annotations(values: dict[str, Any], finding: str | None) -> None:
    found = findings(config(objective={"_target_": "Loss", **values}))
    assert found == ([finding] if finding else [])


def test_all_findings_are_reported_at_once_with_the_name_of_the_step() -> None:
    wrong = config({"size": "x"}, objective={"_target_": "Loss", "beta": 0, "betta": 1})
    assert findings(wrong, "align") == [
        "align.objective.betta: unknown option (did you mean align.objective.beta?)",
        "align.objective.beta=0: should be greater than 0",
        "align.stage.size=x: should be a valid integer, unable to parse string as an integer",
    ]


def test_nested_nodes_are_validated() -> None:
    reward = {"_target_": "Outer", "inner": {"_target_": "Inner", "width": 0}}
    assert findings(config(reward=reward)) == ["reward.inner.width=0: should be greater than 0"]
    reward["inner"] = {"_target_": "Inner"}
    assert findings(config(reward=reward)) == [
        "reward.inner.width: is required and has no value; type reward.inner.width=..."
    ]


def test_missing_and_unread_groups_are_reported() -> None:
    assert findings(config(model=1)) == []
    without = config()
    del without["objective"]
    (finding,) = findings(without)
    assert finding.startswith("stage=Stage needs the group objective; type +objective=")
    (finding,) = findings(config(annotator={"_target_": "Inner", "width": 1}))
    assert finding == "annotator: stage=Stage does not read it; it reads model, objective, reward, stage"


def test_an_objective_of_the_wrong_kind_is_refused() -> None:
    wrong = config(stage={"_target_": "TokenStage"})
    del wrong["stage"]["size"]
    assert findings(wrong) == ["stage=TokenStage does not take objective=Loss; it takes: cross_entropy"]
    (finding,) = findings(wrong, "sft")
    assert finding == "stage=TokenStage does not take objective@sft.objective=Loss; it takes: cross_entropy"


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ("data.max_prompt_length=480", "collect.data.max_prompt_length=480"),
        ("data.parts.first.source", "collect.data.parts.first.source"),
        ("inputs.policy=y", "collect.inputs.policy=y"),
        ("model.path=x", "collect.model.path=x"),
        # keys that the step takes from the root
        ("model.chat_template=chatml", "model.chat_template=chatml"),
        ("inputs.judge=x", "inputs.judge=x"),
        ("adapter=lora", "adapter=lora"),
        # options of groups
        ("sampler=best_of_k", "sampler@collect.sampler=best_of_k"),
        ("stage=dpo", "stage@collect=dpo"),
        ("data@text=text", "data@collect.text=text"),
        ("+reward@data.parts.x=gold", "+reward@collect.data.parts.x=gold"),
        ("text=null", "collect.text=null"),
    ],
)
def test_config_keys_are_named_as_typed_in_a_pipeline(typed: str, named: str) -> None:
    own: dict[str, Any] = {group: {"_target_": "x", "size": 1} for group in ("data", "sampler", "stage")}
    own |= {"text": None, "model": {"path": "p"}, "inputs": {"policy": "p"}}
    name, _, value = typed.partition("=")
    error = UserError("is wrong", fix=f"type {key(name, value)}" if value else f"see {key(name)}")
    said = f"collect: is wrong; {'type' if value else 'see'}"
    assert str(name_in_step(error, own, "collect")) == f"{said} {named}"
    assert str(name_in_step(error, own, "collect")) == f"{said} {named}"
    assert str(name_in_step(UserError("is wrong", fix=f"type {key(name)}"), {}, "collect")) == f"is wrong; type {name}"


def test_text_of_an_error_that_is_not_marked_never_changes() -> None:
    own = {"data": {"_target_": "x"}}
    error = UserError("row 3 of data.jsonl says data.size=3", option="data.source", value="data.size=4")
    name_in_step(error, own, "sft")
    assert str(error) == "sft.data.source=data.size=4: row 3 of data.jsonl says data.size=3"
    assert error.where == ""  # the key names the step already


def test_an_import_failure_is_reported_with_its_cause() -> None:
    (finding,) = findings(config(reward={"_target_": "no_such_package.Thing"}))
    assert finding == (
        "reward._target_: cannot import no_such_package.Thing (ModuleNotFoundError: No module named 'no_such_package')"
    )


def test_root_values_are_validated() -> None:
    assert findings(config(seed="x")) == ["seed=x: should be a valid integer, unable to parse string as an integer"]
    assert findings(config(objectve={"beta": 1})) == ["objectve: unknown option (did you mean objective?)"]


def test_errors_of_data_name_the_group_that_they_are_in(tmp_path: Path) -> None:
    """The class knows its group as ``data``; the stage has it as ``text`` or ``demonstrations``."""
    node = {"_target_": "rlhf.data.data.Data", "record": "text", "source": "testbed", "size": 1, "validation": 0}
    node |= {"max_length": 8, "format": "nope"}
    (finding,) = check_node(Data, node, "align.text")
    assert str(finding).startswith("align.text.format=nope: no such format")
    part = Data("text", str(tmp_path / "none.jsonl"), 1, 0, 8)
    mixture = Mixture({"a": part}, {"a": 1.0}, size=1)
    for read in (mixture.load, mixture.digest):
        with pytest.raises(UserError, match=r"^data.parts.a.source=.*none.jsonl: no such file"):
            read()
    config = {"text": {**node, "format": "auto", "validation": 1.5}}
    with pytest.raises(UserError, match="^text.validation=1.5: must be .* type text.validation=1$"):
        data_digests(config, {}, ["text"])
