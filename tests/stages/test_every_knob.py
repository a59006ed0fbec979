"""No knob does nothing: every knob of every stage, objective, rollout, reward and annotator is moved once.

The knobs are those of the constructors, so that a new one without an entry fails. An entry is

- ``Moves(value, **base)``: with that value, and `base` on both sides, the result is another one;
- ``Stays(value, **base)``: the result is the same, to the last bits of fp32;
- the name of a test that shows what the knob does.

An objective's knob needs no entry where its annotation says what else it may be and the loss on made-up tensors moves.
"""

import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import get_object
from omegaconf import OmegaConf

from rlhf import objective as protocols
from rlhf import validation
from rlhf.annotators import GoldAnnotator, RewardAnnotator
from rlhf.best_of_k import BestOfK
from rlhf.build import quiet
from rlhf.combination import GatedReward, WeightedReward
from rlhf.objective import CrossEntropy
from rlhf.rollout import Rollout, Sampler
from rlhf.scoring import FunctionReward, GoldReward, ModelReward
from rlhf.stage import Stage
from rlhf.testing import rollout, tiny_model
from rlhf_collect.stage import CollectStage
from rlhf_dpo.objective import DPO
from rlhf_dpo.stage import DPOStage
from rlhf_grpo.objective import GRPO
from rlhf_grpo.stage import GRPOStage
from rlhf_ppo.objective import PPO
from rlhf_ppo.stage import PPOStage
from rlhf_pretrain.stage import PretrainStage
from rlhf_rejection_sampling.stage import RejectionSamplingStage
from rlhf_reward_model.objective import Pairwise
from rlhf_reward_model.stage import RewardModelStage
from rlhf_rloo.stage import RLOOStage
from rlhf_sft.stage import SFTStage
from tests.names import ROOT, known

from .conftest import adamw, constant, data, fit

Load = Callable[..., Any]


class Moves:
    """Another value, and what else is set on both sides."""

    def __init__(self, value: Any, **base: Any) -> None:
        self.value, self.base = value, base


class Stays(Moves):
    """A value that must not change the result."""


Entry = Moves | str


def at(file: str, name: str) -> str:
    return f"tests/{file}.py::test_{name}"


# -- stages ---------------------------------------------------------------------------------------------------------


class Varied:
    """A reward of any scale that differs between replies, and sees whether they ended."""

    def __call__(self, sampled: Rollout) -> torch.Tensor:
        return 3.0 + 4.0 * (sampled.response_ids * sampled.mask).float().sum(1).sin() + sampled.ended.float()


class Idle(Varied):
    """That reward, and equal scores for the replies to every other prompt."""

    def __call__(self, sampled: Rollout) -> torch.Tensor:
        odd = [len(prompt.messages[-1].content) % 2 == 1 for prompt in sampled.prompts]
        return torch.where(torch.tensor(odd), super().__call__(sampled), 1.0)


def sampled(kind: type[Stage], objective: Any, samples: int) -> Callable[..., Stage]:
    def make(load: Load, gamma: float = 0.0, reward: Any = None, **knobs: Any) -> Stage:
        knobs = {"batch_size": 4, "steps": 2, "epochs": 1, "minibatches": 2, "text_length": 32, **knobs}
        parts = (data("prompt", 16, 2), data("text", 16, 2), reward or Varied(), Sampler(8, samples=samples))
        return kind(load(), objective(gamma=gamma), *parts, adamw, constant, **knobs)

    return make


def given(kind: type[Stage], objective: Any, record: str) -> Callable[..., Stage]:
    def make(load: Load, **knobs: Any) -> Stage:
        torch.manual_seed(3)
        return kind(load(), objective, data(record, 16, 4), adamw, constant, **{"batch_size": 4, "epochs": 1, **knobs})

    return make


def rejection(load: Load, **knobs: Any) -> Stage:
    parts = (data("prompt", 8, 2), Varied(), BestOfK(8, samples=3), adamw, constant)
    return RejectionSamplingStage(load(), CrossEntropy(), *parts, **{"batch_size": 4, "epochs": 1, **knobs})


def collect(load: Load, **knobs: Any) -> Stage:
    return CollectStage(load(), data("prompt", 8, 2), Sampler(8, samples=3), GoldAnnotator(0.5), **knobs)


TRAINED: dict[str, Entry] = {
    "batch_size": Moves(2),
    "micro_batch_size": Stays(1),
    "gradient_clip": Moves(0.01),
    "epochs": Moves(2),
}
ROLLED: dict[str, Entry] = TRAINED | {
    "steps": Moves(1),
    "minibatches": Moves(1),
    "text_ratio": Moves(2.0, gamma=1.0),
    "text_length": Moves(16, gamma=1.0),
    "missing_end": Moves("replace", missing_end_penalty=3.0),
    "missing_end_penalty": Moves(3.0, normalize_scores="none", score_clip=None),
    "score_clip": Moves(0.5),
    "normalize_scores": Moves("batch", score_clip=2.0),
    "kl_budget": at("stages/test_ppo", "a_kl_budget_ends_the_training_and_keeps_the_result"),
    "average": Moves(0.5),
    "reference": at("stages/test_ppo_inputs", "a_reference_of_its_own_is_where_kl_is_measured_from"),
    "tolerance": at("stages/test_exactness", "ppo_stops_when_the_sampler_is_not_the_policy"),
}
STAGES: dict[type[Stage], tuple[Callable[..., Stage], dict[str, Entry]]] = {
    PretrainStage: (given(PretrainStage, CrossEntropy(), "text"), TRAINED | {"context": Moves(32)}),
    SFTStage: (given(SFTStage, CrossEntropy(), "demonstration"), TRAINED | {"packing": Moves(96)}),
    RewardModelStage: (
        given(RewardModelStage, Pairwise(), "comparison"),
        TRAINED
        | {
            "head_init": Moves("zero"),
            "normalize": Moves("mean"),
            "safety_coefficient": Moves(0.5),
        },
    ),
    DPOStage: (
        given(DPOStage, DPO(), "comparison"),
        TRAINED | {"reference": at("stages/test_preferences", "another_reference_is_read")},
    ),
    RejectionSamplingStage: (
        rejection,
        TRAINED
        | {
            "packing": Moves(64),
            "select": Moves("random_per_prompt"),
            "sampler": at("stages/test_rejection_sampling", "another_model_samples_than_is_trained"),
            "earlier": at("stages/test_rejection_sampling", "best_samples_of_earlier_rounds_are_kept_or_not"),
            "keep_earlier": at("stages/test_rejection_sampling", "best_samples_of_earlier_rounds_are_kept_or_not"),
        },
    ),
    PPOStage: (
        sampled(PPOStage, PPO, 1),
        ROLLED
        | {
            "value": at("stages/test_ppo_critic", "the_critic_starts_from_the_reward_model"),
            "value_warmup": Moves(1),
        },
    ),
    GRPOStage: (sampled(GRPOStage, GRPO, 3), ROLLED | {"refills": Moves(3, reward=Idle())}),
    # The same constructor and the same code as GRPO's (test_rloo_is_grpo_but_for_its_objective).
    RLOOStage: (
        sampled(GRPOStage, GRPO, 3),
        {name: at("stages/test_every_knob", "rloo_is_grpo_but_for_its_objective") for name in [*ROLLED, "refills"]},
    ),
    CollectStage: (collect, {"batch_size": Moves(3)}),
}


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
OF_THE_STAGE: dict[str, Entry] = {  # read by the stage, not by the loss
    "gamma of PPO": at("stages/test_exactness", "the_gradient_is_linear_in_gamma"),
    "gamma of GRPO": at("stages/test_groups", "the_gradient_is_linear_in_gamma"),
    "gamma of RLOO": at("stages/test_groups", "the_gradient_is_linear_in_gamma"),
    "pooling of Relative": at("stages/test_preferences", "every_loss_trains"),
    "pooling of RelativeUnpaired": at("stages/test_preferences", "every_loss_trains"),
    "encoder of Relative": at("stages/test_preferences", "another_encoder_reads_the_prompts_text"),
    "encoder of RelativeUnpaired": at("stages/test_preferences", "another_encoder_reads_the_prompts_text"),
    "kl_horizon of PPO": Moves(100.0, kl_target=0.01),
    "kl_target of PPO": Moves(0.01),
    "kl_in of GRPO": Moves("reward", beta=0.1),
    "margin of Pairwise": Moves({"better": 0.7}),
}


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


@dataclass(frozen=True)
class Given:
    """How the result of an option is seen, and its knobs."""

    outcome: Callable[..., Any]
    entries: dict[str, Entry]


@cache
def policy() -> Any:
    model = tiny_model()
    bias = torch.zeros(model.config.vocab_size)
    bias[model.end_id] = 3.0  # ends its turns soon
    model.base.get_output_embeddings().bias = torch.nn.Parameter(bias, requires_grad=False)
    return model


def replies(kind: type[Sampler], **knobs: Any) -> Any:
    prompts = rollout(["What is two plus two?", "And four?"], ["", ""]).prompts
    found = kind(**{"max_new_tokens": 6, "samples": 4, **knobs}).sample(policy(), prompts, seed=1)
    return found.texts, [round(value, 4) for value in found.logp.sum(1).tolist()]


def shared(**more: Entry) -> dict[str, Entry]:
    return {
        "max_new_tokens": Moves(3),
        "temperature": Moves(0.5),
        "top_k": Moves(3),
        "top_p": Moves(0.3),
        "samples": Moves(3),
        "batch_size": Stays(2),
    } | more


def judged(kind: type, **knobs: Any) -> Any:
    if kind is RewardAnnotator:
        knobs = {"reward": FunctionReward(f"{__name__}:points")} | knobs
    asked = data("prompt", 16, 2).train[:6]
    prompts = [prompt for prompt in asked for _ in range(3)]
    texts = ["No.", "I cannot help you to harm somebody, sorry.", "Ben lives in Rome, of course."] * 6
    made = rollout(["?"] * 18, texts)
    made.prompts[:] = prompts
    return [(x.responses, x.grades) for x in kind(**knobs)(made, samples=3, seed=0)]


def points(prompt: Any, reply: str, more: float = 0.0, each: float = 0.1) -> float:
    """A rule."""
    return each * len(reply) + more


TAGS: list[tuple[str, ...]] = [("unsafe",), (), (), (), ()]


def scored(kind: type, **knobs: Any) -> Any:
    if kind is GoldReward:
        made = rollout(["?"] * 16, ["I cannot help with that."] * 16)
        made.prompts[:] = data("prompt", 16, 2).train
        return kind(**knobs)(made).tolist()
    made = rollout(["2 + 2?"] * 5, ["It is four, or 4.", "#### 7", "nothing", "So 4 of 5.", "4"])
    prompts = [type(prompt)(prompt.messages, tags, "4") for prompt, tags in zip(made.prompts, TAGS, strict=True)]
    made.prompts[:] = prompts
    if kind is GatedReward:
        fixed = [FunctionReward(f"{__name__}:points", {"each": 0.001 * i, "more": 0.2 * i}) for i in (2, 1)]
        knobs = {"helpfulness": fixed[0], "safety": fixed[1]} | knobs
    if kind is WeightedReward:
        knobs = {"rewards": {"rule": FunctionReward(f"{__name__}:points")}} | knobs
    if kind is FunctionReward:
        knobs = {"function": f"{__name__}:points"} | knobs
    return kind(**knobs)(made).tolist()


OF_THE_TOOLS = at("stages/test_every_knob", "every_knob_of_the_tools")
JUDGE = "annotators/test_judge"
OPTIONS: dict[str, Given] = {
    "rlhf.rollout.Sampler": Given(replies, shared()),
    "rlhf.best_of_k.BestOfK": Given(replies, shared(temperatures=Moves([0.5, 1.5]))),
    "rlhf.tools.ToolSampler": Given(
        replies,
        dict.fromkeys([*shared(), "tools", "max_calls", "max_result_tokens"], OF_THE_TOOLS),
    ),
    "rlhf.scoring.GoldReward": Given(scored, {"aspect": Moves("safety")}),
    "rlhf.scoring.ModelReward": Given(
        scored,
        {
            "path": at("stages/test_rewards", "a_reward_model_reads_the_text_in_its_own_tokens"),
            "batch_size": at("stages/test_every_knob", "the_batch_size_of_a_reward_model_changes_no_score"),
        },
    ),
    "rlhf.scoring.FunctionReward": Given(
        scored,
        {
            "function": at("stages/test_rewards", "a_rule_takes_arguments"),
            "arguments": Moves({"more": 2.0}),
        },
    ),
    "rlhf.exact_match.ExactMatch": Given(
        scored,
        {
            "extract": Moves("whole"),
            "pattern": Moves("of (5)", extract="regex", pattern="So (4)"),
            "numbers": at("stages/test_exact_match", "scores"),
            "correct": Moves(2.0),
            "wrong": Moves(-1.0),
            "missing": Moves(-1.0),
        },
    ),
    "rlhf.combination.GatedReward": Given(
        scored,
        {
            "helpfulness": at("stages/test_rewards", "the_gate_on_the_sigmoid"),
            "safety": at("stages/test_rewards", "the_gate_on_the_sigmoid"),
            "threshold": Moves(0.6),
            "eps": Moves(0.45),
            "scale": Moves("probability"),
        },
    ),
    "rlhf.combination.WeightedReward": Given(
        scored,
        {"rewards": at("stages/test_rewards", "weights"), "weights": Moves({"rule": 0.5}, weights={"rule": 1.0})},
    ),
    "rlhf.annotators.GoldAnnotator": Given(judged, {"noise": Moves(2.0), "aspect": Moves("helpfulness")}),
    "rlhf.annotators.RewardAnnotator": Given(
        judged,
        {
            "reward": at("stages/test_every_knob", "every_knob_of_an_option"),
            "thresholds": Moves((0.1, 5.0, 9.0)),
            "tie": Moves(1.5),
        },
    ),
    "rlhf.judge.JudgeAnnotator": Given(
        judged,
        {
            "path": at(JUDGE, "another_question_template_or_judge_is_another_key"),
            "template": at(JUDGE, "another_question_template_or_judge_is_another_key"),
            "answer": at(JUDGE, "thresholds_grade_and_written_answers_have_no_grade"),
            "both_orders": at(JUDGE, "one_order_is_half_the_questions_and_sees_no_bias"),
            "thresholds": at(JUDGE, "thresholds_grade_and_written_answers_have_no_grade"),
            "least_mass": at(JUDGE, "an_untrained_model_is_no_judge"),
            "max_nonsense": at(JUDGE, "too_much_nonsense_is_refused_in_one_line"),
            "max_new_tokens": at(JUDGE, "the_length_of_written_answers_and_the_number_format"),
            "batch_size": at(JUDGE, "log_odds_are_those_of_the_next_token_whatever_the_batch"),
            "dtype": at(JUDGE, "the_length_of_written_answers_and_the_number_format"),
            "cache": at(JUDGE, "the_cache_can_be_off"),
        },
    ),
}


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
