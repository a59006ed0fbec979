"""What each knob is moved to, and how the result is seen: the tables that ``test_every_knob`` goes through.

The knobs are those of the constructors, so that a new one without an entry fails. An entry is

- ``Moves(value, **base)``: with that value, and `base` on both sides, the result is another one;
- ``Stays(value, **base)``: the result is the same, to the last bits of fp32;
- the name of a test that shows what the knob does.

An objective's knob needs no entry where its annotation says what else it may be and the loss on made-up tensors moves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from rlhf.annotators import GoldAnnotator, RewardAnnotator
from rlhf.best_of_k import BestOfK
from rlhf.combination import GatedReward, WeightedReward
from rlhf.objective import CrossEntropy
from rlhf.rollout import Rollout, Sampler
from rlhf.scoring import FunctionReward, GoldReward
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

from .conftest import adamw, constant, data

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
    "missing_end": Moves("replace"),
    "missing_end_penalty": Moves(3.0, missing_end="subtract", normalize_scores="none", score_clip=None),
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
            "missing_end": at("stages/test_rejection_sampling", "a_cut_candidate_is_picked_by_its_treated_score"),
            "missing_end_penalty": at(
                "stages/test_rejection_sampling", "a_cut_candidate_is_picked_by_its_treated_score"
            ),
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


# -- objectives -----------------------------------------------------------------------------------------------------

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
