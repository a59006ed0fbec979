"""Configs against constructors: every finding, in one line that can be acted on."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from omegaconf import OmegaConf
from pydantic import Field

from rlhf import validation
from rlhf.config import said_of_step
from rlhf.errors import UserError
from rlhf.objective import PairObjective, TokenObjective

HERE = __name__


@dataclass(frozen=True)
class Loss(PairObjective):
    """Has one of each kind of knob."""

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
    """Positional parameters are groups, keyword parameters knobs."""

    def __init__(self, model: Any, objective: PairObjective, reward: Any = None, *, size: int) -> None:
        pass


class TokenStage:
    """Takes another kind of objective."""

    def __init__(self, model: Any, objective: TokenObjective) -> None:
        pass


class Inner:
    """Built from a node within a node."""

    def __init__(self, width: Annotated[int, Field(gt=0)]) -> None:
        pass


class Outer:
    """Holds another object, so its own annotation is no plain value's."""

    def __init__(self, inner: Inner, anything: Any = None) -> None:
        pass


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets are named by module, and a test module has no importable name of its own."""
    real = validation.get_object
    names = {c.__name__: c for c in (Loss, Stage, TokenStage, Inner, Outer)}
    monkeypatch.setattr(validation, "get_object", lambda name: names.get(name) or real(name))


def findings(config: dict[str, Any], step: str = "") -> list[str]:
    try:
        validation.check(OmegaConf.create(config), step)
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
        ({"beta": "???"}, "objective.beta: no value; type objective.beta=..."),
        ({"beta": "${nowhere}"}, "objective.beta: Interpolation key 'nowhere' not found"),
    ],
)
def test_values(values: dict[str, Any], finding: str | None) -> None:
    found = findings(config(objective={"_target_": "Loss", **values}))
    assert found == ([finding] if finding else [])


def test_all_findings_at_once_with_the_steps_name() -> None:
    wrong = config({"size": "x"}, objective={"_target_": "Loss", "beta": 0, "betta": 1})
    assert findings(wrong, "align") == [
        "align.objective.betta: unknown option (did you mean align.objective.beta?)",
        "align.objective.beta=0: should be greater than 0",
        "align.stage.size=x: should be a valid integer, unable to parse string as an integer",
    ]


def test_nodes_within_nodes() -> None:
    reward = {"_target_": "Outer", "inner": {"_target_": "Inner", "width": 0}}
    assert findings(config(reward=reward)) == ["reward.inner.width=0: should be greater than 0"]
    reward["inner"] = {"_target_": "Inner"}
    assert findings(config(reward=reward)) == ["reward.inner.width: required, no value; type reward.inner.width=..."]


def test_groups_of_the_stage() -> None:
    assert findings(config(model=1)) == []
    without = config()
    del without["objective"]
    (finding,) = findings(without)
    assert finding.startswith("stage=Stage needs the group objective; type +objective=")
    (finding,) = findings(config(annotator={"_target_": "Inner", "width": 1}))
    assert finding == "annotator: stage=Stage does not read it; it reads model, objective, reward, stage"


def test_wrong_objective() -> None:
    wrong = config(stage={"_target_": "TokenStage"})
    del wrong["stage"]["size"]
    assert findings(wrong) == ["stage=TokenStage does not take objective=Loss; it takes: cross_entropy"]
    (finding,) = findings(wrong, "sft")
    assert finding == "stage=TokenStage does not take objective@sft.objective=Loss; it takes: cross_entropy"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("set data.max_prompt_length=480", "collect: set collect.data.max_prompt_length=480"),
        ("or a smaller rollout.max_new_tokens.", "collect: or a smaller collect.rollout.max_new_tokens."),
        ("data.parts.first.source: row 3", "collect: collect.data.parts.first.source: row 3"),
        # typed at the root, as the step takes them from there
        (
            "type model.chat_template=chatml trainer.devices=1",
            "collect: type model.chat_template=chatml trainer.devices=1",
        ),
        ("model.path=x: no weights", "collect: collect.model.path=x: no weights"),
        ("inputs.judge=x, inputs.policy=y", "collect: inputs.judge=x, collect.inputs.policy=y"),
        # options of groups
        ("type rollout=best_of_k stage=dpo", "collect: type rollout@collect.rollout=best_of_k stage@collect=dpo"),
        ("data@text=text", "collect: data@collect.text=text"),
        ("reward@data.parts.x=gold", "collect: reward@collect.data.parts.x=gold"),
        ("text=null adapter=lora", "collect: text=null adapter=lora"),
        # what stands as it is typed, and what is no key
        ("collect: collect.data.source=x", "collect: collect.data.source=x"),
        ("collect failed: see align.data.size", "collect failed: see align.data.size"),
        ("/tmp/data.jsonl, ./data.jsonl, my-data.x", "collect: /tmp/data.jsonl, ./data.jsonl, my-data.x"),
    ],
)
def test_keys_as_they_are_typed_in_a_pipeline(message: str, said: str) -> None:
    own: dict[str, Any] = {group: {"_target_": "x", "size": 1} for group in ("data", "rollout", "stage")}
    own |= {"text": None, "model": {"path": "p"}, "inputs": {"policy": "p"}}
    assert said_of_step(message, own, "collect") == said
    assert said_of_step(said, own, "collect") == said
    assert said_of_step(message, {}, "collect") == message


def test_code_that_cannot_be_imported_says_why() -> None:
    (finding,) = findings(config(reward={"_target_": "no_such_package.Thing"}))
    assert finding == (
        "reward._target_: cannot import no_such_package.Thing (ModuleNotFoundError: No module named 'no_such_package')"
    )


def test_root_values() -> None:
    assert findings(config(seed="x")) == ["seed=x: should be a valid integer, unable to parse string as an integer"]
    assert findings(config(objectve={"beta": 1})) == ["objectve: unknown option (did you mean objective?)"]
