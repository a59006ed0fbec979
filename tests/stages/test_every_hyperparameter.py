"""Every hyperparameter of every stage, objective, sampler, reward and annotator has an effect.

The values that they are changed to are in ``hyperparameters``.
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
from rlhf import signatures
from rlhf.console import silence_libraries
from rlhf.reward.model import ModelReward
from rlhf.stage.base import Stage
from rlhf.testing import tiny_model
from rlhf_collect.stage import CollectStage
from rlhf_grpo.stage import GRPOStage
from rlhf_rloo.stage import RLOOStage
from tests.names import ROOT, known, stage_files

from .conftest import fit
from .hyperparameters import OF_THE_STAGE, OPTIONS, STAGES, Load, Moves, Stays, responses, scored, shared

# -- stages ---------------------------------------------------------------------------------------------------------


def stages() -> set[type[Stage]]:
    """The stage classes that the plugins' YAMLs name."""
    return {get_object(OmegaConf.load(path)["stage"]["_target_"]) for path in stage_files()}


def own_hyperparameters(kind: type) -> set[str]:
    parameters = signatures.parameters(kind) or {}
    return {name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}


def test_every_stage_and_each_of_its_hyperparameters_has_an_entry() -> None:
    assert stages() == {*STAGES}
    for kind, (_, entries) in STAGES.items():
        assert own_hyperparameters(kind) == {*entries}, kind.__name__


def test_rloo_differs_from_grpo_in_its_objective_alone() -> None:
    import inspect

    assert RLOOStage.__init__ is GRPOStage.__init__
    steps = [inspect.getsource(kind.training_step) for kind in (RLOOStage, GRPOStage)]
    assert steps[0].split('"""')[2] == steps[1].split('"""')[2]
    assert {name for name in vars(RLOOStage) if not name.startswith("_")} == {"training_step"}


def result(stage: Stage, folder: Path) -> dict[str, torch.Tensor]:
    """Return everything that a run saves: weights and buffers, or the comparisons that were written."""
    if isinstance(stage, CollectStage):
        stage.run_directory = folder
        silence_libraries()
        pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).predict(stage, return_predictions=False)
        return {"text": torch.tensor([*(folder / "comparisons.jsonl").read_bytes()])}
    fit(stage, folder, limit_val_batches=0)
    with getattr(stage, "ema_weights", lambda: torch.no_grad())():
        return {name: value.detach().float().clone() for name, value in stage.state_dict().items()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], tolerance: float = 0.0) -> bool:
    """Return whether two results differ by more than rounding."""
    if before.keys() != after.keys() or any(before[name].shape != after[name].shape for name in before):
        return True
    return any(((before[name] - after[name]).abs() > tolerance).any() for name in before)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, torch.Tensor]]:
    """Return a function that computes the results of the base values, each once."""
    done: dict[str, dict[str, torch.Tensor]] = {}

    def of(kind: type[Stage], load: Load, base: dict[str, Any]) -> dict[str, torch.Tensor]:
        name = f"{kind.__name__} {sorted((key, repr(type(x) if key == 'reward' else x)) for key, x in base.items())}"
        if name not in done:
            done[name] = result(STAGES[kind][0](load, **base), tmp_path_factory.mktemp("plain"))
        return done[name]

    return of


RUNS = [
    pytest.param(kind, hyperparameter, id=f"{kind.__name__}-{hyperparameter}")
    for kind, (_, entries) in STAGES.items()
    for hyperparameter, entry in entries.items()
    if isinstance(entry, Moves)
]


@pytest.mark.parametrize(("kind", "hyperparameter"), RUNS)
def test_every_hyperparameter_of_a_stage_has_an_effect(
    kind: type[Stage], hyperparameter: str, load: Load, plain: Callable, tmp_path: Path
) -> None:
    make, entries = STAGES[kind]
    entry = entries[hyperparameter]
    assert isinstance(entry, Moves)
    before, after = (
        plain(kind, load, entry.base),
        result(make(load, **entry.base, **{hyperparameter: entry.value}), tmp_path),
    )
    assert moved(before, after, 2e-4) is False if isinstance(entry, Stays) else moved(before, after), (
        "a dead hyperparameter"
    )


# -- objectives -----------------------------------------------------------------------------------------------------

OBJECTIVES = sorted([*ROOT.glob("conf/objective/*.yaml"), *ROOT.glob("plugins/*/conf/objective/*.yaml")])


def another(annotation: Any, value: Any) -> Any:
    """Return a value that the annotation allows and that differs from the given one."""
    kinds = typing.get_args(annotation) if typing.get_origin(annotation) is not typing.Annotated else (annotation,)
    for kind in (annotation, *kinds):
        if typing.get_origin(kind) is typing.Literal:
            return next(choice for choice in typing.get_args(kind) if choice != value)
    if isinstance(value, bool):
        return not value
    return value * 0.5 if value else 0.1


def outcome(objective: Any) -> torch.Tensor:
    """Return everything an objective computes from made-up tensors, flattened."""
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
        found = (noise, old, estimate[1], values + noise + 1, values, estimate[2], torch.rand(p, t))
        loss, _ = objective(*found, *corrected(objective, old, values, mask))
        return torch.cat([*map(torch.flatten, (*estimate, loss)), torch.tensor([objective.next_beta(0.1, 3.0, 8)])])
    if isinstance(objective, protocols.GroupObjective):
        advantages, keep = objective.advantages(scores, old, ref, mask, 3)
        weights, divisor = objective.weights(mask, 9)
        found = (noise, old, ref, advantages, mask, torch.rand(p, t))
        losses = objective(*found, *corrected(objective, old, values, mask))[0]
        return torch.cat([(losses * weights).flatten(), advantages, keep.float(), divisor])
    assert isinstance(objective, protocols.TokenObjective)
    return objective(old)[0]


def corrected(objective: Any, *found: torch.Tensor) -> list[torch.Tensor]:
    """Return the weights of the policy loss that correct the sampler, if the objective has some."""
    weights = objective.sampler_weights(*found)
    return [] if weights is None else [weights[0]]


def hyperparameters_of_objectives() -> Iterator[Any]:
    for path in OBJECTIVES:
        target = get_object(OmegaConf.load(path)["_target_"])
        for hyperparameter, parameter in (signatures.parameters(target) or {}).items():
            yield pytest.param(path, hyperparameter, parameter.annotation, id=f"{path.stem}-{hyperparameter}")


@pytest.mark.parametrize(("path", "hyperparameter", "annotation"), [*hyperparameters_of_objectives()])
def test_every_hyperparameter_of_an_objective_has_an_effect(path: Path, hyperparameter: str, annotation: Any) -> None:
    node: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(path))  # type: ignore[assignment]
    target = get_object(node.pop("_target_"))
    names = [f"{hyperparameter} of {kind.__name__}" for kind in target.__mro__]  # DAPO's hyperparameters are GRPO's
    entry = next((OF_THE_STAGE[name] for name in names if name in OF_THE_STAGE), None)
    if isinstance(entry, str):
        assert entry in known()
        return
    base = node | (entry.base if entry else {})
    value = entry.value if entry else another(annotation, base[hyperparameter])
    before, after = outcome(target(**base)), outcome(target(**base | {hyperparameter: value}))
    assert before.shape != after.shape or not torch.equal(before, after), f"{path.stem}.{hyperparameter} does nothing"


# -- samplers, rewards, annotators ------------------------------------------------------------------------------------


def options() -> set[str]:
    files = [path for group in ("sampler", "reward", "annotator") for path in ROOT.glob(f"**/conf/{group}/*.yaml")]
    found = {OmegaConf.load(path).get("_target_") for path in files if "tests" not in path.relative_to(ROOT).parts}
    return found - {None}


def test_every_option_and_each_of_its_hyperparameters_has_an_entry() -> None:
    assert options() == {*OPTIONS}
    for name, option in OPTIONS.items():
        assert {*(signatures.parameters(get_object(name)) or {})} == {*option.entries}, name


SEEN = [
    pytest.param(name, hyperparameter, id=f"{name.rpartition('.')[2]}-{hyperparameter}")
    for name, option in OPTIONS.items()
    for hyperparameter, entry in option.entries.items()
    if isinstance(entry, Moves)
]


@pytest.mark.parametrize(("name", "hyperparameter"), SEEN)
def test_every_hyperparameter_of_an_option_has_an_effect(name: str, hyperparameter: str) -> None:
    option, kind = OPTIONS[name], get_object(name)
    entry = option.entries[hyperparameter]
    assert isinstance(entry, Moves)
    before, after = (option.outcome(kind, **each) for each in (entry.base, entry.base | {hyperparameter: entry.value}))
    assert (before == after) is isinstance(entry, Stays)


def test_every_hyperparameter_of_the_tools_has_an_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy calls a tool in every other turn, whatever it writes."""
    import rlhf.sampler.tool_calls
    from rlhf.data.tool_calls import Call
    from rlhf.sampler.tool_calls import Calculator, Search, ToolSampler

    monkeypatch.setattr(
        rlhf.sampler.tool_calls, "read_call", lambda turn: Call("calculator", "30+4") if len(turn) % 2 else None
    )
    plain = responses(ToolSampler, tools={"calculator": Calculator()})
    assert any(value != "" for value in plain[0])
    other = {
        **{hyperparameter: e.value for hyperparameter, e in shared().items()},
        "max_calls": 1,
        "max_result_tokens": 1,
    }  # type: ignore[union-attr]
    for hyperparameter, value in other.items():
        same = responses(ToolSampler, **{"tools": {"calculator": Calculator()}, hyperparameter: value}) == plain
        assert same is isinstance(shared().get(hyperparameter), Stays), hyperparameter
    assert responses(ToolSampler, tools={"search": Search()}) != plain  # "no such tool"
    with pytest.raises(ValueError, match="too long"):
        Calculator(max_characters=3)("12+34")
    assert Calculator()("12+34") == "46"
    assert len(Search(results=3)("Rome")) > len(Search()("Rome"))


def test_the_batch_size_of_a_reward_model_does_not_change_scores(tmp_path: Path) -> None:
    from rlhf.models.scalar import ScalarModel

    ScalarModel.load(tiny_model()).save(tmp_path)
    scores = [scored(ModelReward, path=str(tmp_path), batch_size=size) for size in (256, 2)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_every_test_named_in_a_table_exists() -> None:
    entries = [entry for _, own in STAGES.values() for entry in own.values()]
    entries += [entry for option in OPTIONS.values() for entry in option.entries.values()]
    entries += OF_THE_STAGE.values()
    assert {entry for entry in entries if isinstance(entry, str)} - known() == set()
