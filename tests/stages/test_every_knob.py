"""No knob does nothing: every knob of every stage, objective, rollout, reward and annotator is moved once.

What it is moved to is in ``knobs``.
"""

import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import get_object
from omegaconf import OmegaConf

from rlhf import objective as protocols
from rlhf import validation
from rlhf.build import quiet
from rlhf.scoring import ModelReward
from rlhf.stage import Stage
from rlhf.testing import tiny_model
from rlhf_collect.stage import CollectStage
from rlhf_grpo.stage import GRPOStage
from rlhf_rloo.stage import RLOOStage
from tests.names import ROOT, known

from .conftest import fit
from .knobs import OF_THE_STAGE, OPTIONS, STAGES, Load, Moves, Stays, replies, scored, shared

# -- stages ---------------------------------------------------------------------------------------------------------


def stages() -> set[type[Stage]]:
    """The stage classes that the plugins' YAMLs name."""
    files = ROOT.glob("plugins/*/conf/stage/*.yaml")
    return {get_object(OmegaConf.load(path)["stage"]["_target_"]) for path in files}


def own_knobs(kind: type) -> set[str]:
    parameters = validation.parameters(kind) or {}
    return {name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}


def test_every_stage_and_each_of_its_knobs_has_an_entry() -> None:
    assert stages() == {*STAGES}
    for kind, (_, entries) in STAGES.items():
        assert own_knobs(kind) == {*entries}, kind.__name__


def test_rloo_is_grpo_but_for_its_objective() -> None:
    import inspect

    assert RLOOStage.__init__ is GRPOStage.__init__
    steps = [inspect.getsource(kind.training_step) for kind in (RLOOStage, GRPOStage)]
    assert steps[0].split('"""')[2] == steps[1].split('"""')[2]
    assert {name for name in vars(RLOOStage) if not name.startswith("_")} == {"training_step"}


def result(stage: Stage, folder: Path) -> dict[str, torch.Tensor]:
    """All that a run leaves: weights and buffers of what is saved, or the comparisons that were written."""
    if isinstance(stage, CollectStage):
        stage.run_folder = folder
        quiet()
        pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).predict(stage, return_predictions=False)
        return {"text": torch.tensor([*(folder / "comparisons.jsonl").read_bytes()])}
    fit(stage, folder, limit_val_batches=0)
    with getattr(stage, "averaged", lambda: torch.no_grad())():
        return {name: value.detach().float().clone() for name, value in stage.state_dict().items()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], tolerance: float = 0.0) -> bool:
    """Whether two results differ by more than rounding."""
    if before.keys() != after.keys() or any(before[name].shape != after[name].shape for name in before):
        return True
    return any(((before[name] - after[name]).abs() > tolerance).any() for name in before)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, torch.Tensor]]:
    """Results of the values that knobs are compared with, each worked out once."""
    done: dict[str, dict[str, torch.Tensor]] = {}

    def of(kind: type[Stage], load: Load, base: dict[str, Any]) -> dict[str, torch.Tensor]:
        name = f"{kind.__name__} {sorted((key, repr(type(x) if key == 'reward' else x)) for key, x in base.items())}"
        if name not in done:
            done[name] = result(STAGES[kind][0](load, **base), tmp_path_factory.mktemp("plain"))
        return done[name]

    return of


RUNS = [
    pytest.param(kind, knob, id=f"{kind.__name__}-{knob}")
    for kind, (_, entries) in STAGES.items()
    for knob, entry in entries.items()
    if isinstance(entry, Moves)
]


@pytest.mark.parametrize(("kind", "knob"), RUNS)
def test_every_knob_of_a_stage(kind: type[Stage], knob: str, load: Load, plain: Callable, tmp_path: Path) -> None:
    make, entries = STAGES[kind]
    entry = entries[knob]
    assert isinstance(entry, Moves)
    before, after = plain(kind, load, entry.base), result(make(load, **entry.base, **{knob: entry.value}), tmp_path)
    assert moved(before, after, 2e-4) is False if isinstance(entry, Stays) else moved(before, after), "a dead knob"


# -- objectives -----------------------------------------------------------------------------------------------------

OBJECTIVES = sorted([*ROOT.glob("conf/objective/*.yaml"), *ROOT.glob("plugins/*/conf/objective/*.yaml")])


def another(annotation: Any, value: Any) -> Any:
    """A value that the annotation allows and that is not the given one."""
    kinds = typing.get_args(annotation) if typing.get_origin(annotation) is not typing.Annotated else (annotation,)
    for kind in (annotation, *kinds):
        if typing.get_origin(kind) is typing.Literal:
            return next(choice for choice in typing.get_args(kind) if choice != value)
    if isinstance(value, bool):
        return not value
    return value * 0.5 if value else 0.1


def outcome(objective: Any) -> torch.Tensor:
    """Everything an objective makes of made-up tensors, flattened."""
    torch.manual_seed(0)
    p, t = 6, 5
    logps, lengths = -8 * torch.rand(4, p), torch.randint(2, 6, (2, p))
    good, vectors = torch.arange(p) % 2 == 0, torch.randn(p, 3)
    mask = torch.arange(t) < torch.tensor([[5], [3], [1], [4], [2], [5]])
    old, ref, noise, values = -torch.rand(4, p, t) * 2
    scores = torch.tensor([1.0, 3.0, -2.0, 0.5, 0.5, 0.5])
    if isinstance(objective, protocols.PairObjective):
        policy, reference = protocols.PairLogps(*logps[:2], *lengths), protocols.PairLogps(*logps[2:], *lengths)
        return objective(policy, reference, protocols.PairContext(scores, -scores, vectors))[0]
    if isinstance(objective, protocols.LabelObjective):
        return objective(logps[0], logps[2], good, torch.tensor(0.3))[0]
    if isinstance(objective, protocols.ContrastObjective):
        return objective(logps[0], logps[2], good, vectors)[0]
    if isinstance(objective, protocols.ScoreObjective):
        return objective(logps[0], logps[1], torch.tensor([0, 1, 2, 3, -1, 2]))[0]
    if isinstance(objective, protocols.PolicyObjective):
        estimate = objective.estimate(scores, old, ref, values, mask)
        loss, _ = objective(noise, old, estimate[1], values + noise + 1, values, estimate[2], torch.rand(p, t))
        return torch.cat([*map(torch.flatten, (*estimate, loss)), torch.tensor([objective.next_beta(0.1, 3.0, 8)])])
    if isinstance(objective, protocols.GroupObjective):
        advantages, keep = objective.advantages(scores, old, ref, mask, 3)
        weights, divisor = objective.weights(mask, 9)
        losses = objective(noise, old, ref, advantages, mask, torch.rand(p, t))[0]
        return torch.cat([(losses * weights).flatten(), advantages, keep.float(), divisor])
    assert isinstance(objective, protocols.TokenObjective)
    return objective(old)[0]


def knobs_of_objectives() -> Iterator[Any]:
    for path in OBJECTIVES:
        target = get_object(OmegaConf.load(path)["_target_"])
        for knob, parameter in (validation.parameters(target) or {}).items():
            yield pytest.param(path, knob, parameter.annotation, id=f"{path.stem}-{knob}")


@pytest.mark.parametrize(("path", "knob", "annotation"), [*knobs_of_objectives()])
def test_every_knob_of_an_objective(path: Path, knob: str, annotation: Any) -> None:
    node: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(path))  # type: ignore[assignment]
    target = get_object(node.pop("_target_"))
    names = [f"{knob} of {kind.__name__}" for kind in target.__mro__]  # DAPO's knobs are GRPO's
    entry = next((OF_THE_STAGE[name] for name in names if name in OF_THE_STAGE), None)
    if isinstance(entry, str):
        assert entry in known()
        return
    base = node | (entry.base if entry else {})
    value = entry.value if entry else another(annotation, base[knob])
    before, after = outcome(target(**base)), outcome(target(**base | {knob: value}))
    assert before.shape != after.shape or not torch.equal(before, after), f"{path.stem}.{knob} does nothing"


# -- what a stage is given: rollouts, rewards, annotators -------------------------------------------------------------


def options() -> set[str]:
    files = [path for group in ("rollout", "reward", "annotator") for path in ROOT.glob(f"**/conf/{group}/*.yaml")]
    found = {OmegaConf.load(path).get("_target_") for path in files if "tests" not in path.relative_to(ROOT).parts}
    return found - {None}


def test_every_option_and_each_of_its_knobs_has_an_entry() -> None:
    assert options() == {*OPTIONS}
    for name, option in OPTIONS.items():
        assert {*(validation.parameters(get_object(name)) or {})} == {*option.entries}, name


SEEN = [
    pytest.param(name, knob, id=f"{name.rpartition('.')[2]}-{knob}")
    for name, option in OPTIONS.items()
    for knob, entry in option.entries.items()
    if isinstance(entry, Moves)
]


@pytest.mark.parametrize(("name", "knob"), SEEN)
def test_every_knob_of_an_option(name: str, knob: str) -> None:
    option, kind = OPTIONS[name], get_object(name)
    entry = option.entries[knob]
    assert isinstance(entry, Moves)
    before, after = (option.outcome(kind, **each) for each in (entry.base, entry.base | {knob: entry.value}))
    assert (before == after) is isinstance(entry, Stays)


def test_every_knob_of_the_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that calls in every other turn, whatever it writes."""
    import rlhf.tools
    from rlhf.data.calls import Call
    from rlhf.tools import Calculator, Search, ToolSampler

    monkeypatch.setattr(rlhf.tools, "read_call", lambda turn: Call("calculator", "30+4") if len(turn) % 2 else None)
    plain = replies(ToolSampler, tools={"calculator": Calculator()})
    assert any(value != "" for value in plain[0])
    other = {**{knob: e.value for knob, e in shared().items()}, "max_calls": 1, "max_result_tokens": 1}  # type: ignore[union-attr]
    for knob, value in other.items():
        same = replies(ToolSampler, **{"tools": {"calculator": Calculator()}, knob: value}) == plain
        assert same is isinstance(shared().get(knob), Stays), knob
    assert replies(ToolSampler, tools={"search": Search()}) != plain  # "no such tool"
    with pytest.raises(ValueError, match="too long"):
        Calculator(max_characters=3)("12+34")
    assert Calculator()("12+34") == "46"
    assert len(Search(results=3)("Rome")) > len(Search()("Rome"))


def test_the_batch_size_of_a_reward_model_changes_no_score(tmp_path: Path) -> None:
    from rlhf.models.scalar import ScalarModel

    ScalarModel.load(tiny_model()).save(tmp_path)
    scores = [scored(ModelReward, path=str(tmp_path), batch_size=size) for size in (256, 2)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_every_test_that_a_table_names_is_there() -> None:
    entries = [entry for _, own in STAGES.values() for entry in own.values()]
    entries += [entry for option in OPTIONS.values() for entry in option.entries.values()]
    entries += OF_THE_STAGE.values()
    assert {entry for entry in entries if isinstance(entry, str)} - known() == set()
