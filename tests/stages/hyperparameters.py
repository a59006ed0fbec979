"""Tables of ``test_every_hyperparameter``: the value each hyperparameter is changed to, and how the effect is measured.

The hyperparameters are those of the constructors, so that a new one without an entry fails. An entry is

- ``Moves(value, **base)``: with that value, and `base` on both sides, the result differs;
- ``Stays(value, **base)``: the result is the same, to the last bits of fp32;
- the name of a test that shows the effect of the hyperparameter.

An objective's hyperparameter needs no entry where its annotation allows another value and the loss on made-up tensors
changes with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from rlhf.annotator.gold import GoldAnnotator
from rlhf.annotator.reward import RewardAnnotator
from rlhf.objective import CrossEntropy
from rlhf.reward.base import Reward
from rlhf.reward.combined import GatedReward, WeightedReward
from rlhf.reward.function import FunctionReward
from rlhf.reward.gold import GoldReward
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.best_of_k import BestOfK
from rlhf.sampler.rollout import Rollout
from rlhf.stage.base import Stage
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
    """Value that must change the result, and the arguments of both sides."""

    def __init__(self, value: Any, **base: Any) -> None:
        self.value, self.base = value, base


class Stays(Moves):
    """Value that must not change the result."""


Entry = Moves | str


def at(file: str, name: str) -> str:
    return f"tests/{file}.py::test_{name}"


# -- stages ---------------------------------------------------------------------------------------------------------


class Varied(Reward):
    """Reward of any scale that differs between responses and depends on whether they ended."""

    def __call__(self, sampled: Rollout) -> torch.Tensor:
        return 3.0 + 4.0 * (sampled.response_ids * sampled.mask).float().sum(1).sin() + sampled.ended.float()


class Idle(Varied):
    """That reward, with equal scores for the responses to every other prompt."""

    def __call__(self, sampled: Rollout) -> torch.Tensor:
        odd = [len(prompt.messages[-1].content) % 2 == 1 for prompt in sampled.prompts]
        return torch.where(torch.tensor(odd), super().__call__(sampled), 1.0)


def sampled(kind: type[Stage], objective: Any, samples: int) -> Callable[..., Stage]:
    def make(load: Load, gamma: float = 0.0, reward: Any = None, **hyperparameters: Any) -> Stage:
        hyperparameters = {
            "batch_size": 4,
            "steps": 2,
            "epochs": 1,
            "minibatches": 2,
            "text_length": 32,
            **hyperparameters,
        }
        parts = (data("prompt", 16, 2), data("text", 16, 2), reward or Varied(), AncestralSampler(8, samples=samples))
        return kind(load(), objective(gamma=gamma), *parts, adamw, constant, **hyperparameters)

    return make


def given(kind: type[Stage], objective: Any, record: str) -> Callable[..., Stage]:
    def make(load: Load, **hyperparameters: Any) -> Stage:
        torch.manual_seed(3)
        return kind(
            load(), objective, data(record, 16, 4), adamw, constant, **{"batch_size": 4, "epochs": 1, **hyperparameters}
        )

    return make


def rejection(load: Load, **hyperparameters: Any) -> Stage:
    parts = (data("prompt", 8, 2), Varied(), BestOfK(8, samples=3), adamw, constant)
    return RejectionSamplingStage(load(), CrossEntropy(), *parts, **{"batch_size": 4, "epochs": 1, **hyperparameters})


def collect(load: Load, **hyperparameters: Any) -> Stage:
    return CollectStage(
        load(), data("prompt", 8, 2), AncestralSampler(8, samples=3), GoldAnnotator(0.5), **hyperparameters
    )


TRAINED: dict[str, Entry] = {
    "batch_size": Moves(2),
    "micro_batch_size": Stays(1),
    "gradient_clip": Moves(0.01),
    "epochs": Moves(2),
}
ROLLED: dict[str, Entry] = TRAINED | {
    "offload_frozen": at("stages/test_offload", "frozen_models_are_on_the_device_only_while_they_score"),
    "steps": Moves(1),
    "minibatches": Moves(1),
    "text_ratio": Moves(2.0, gamma=1.0),
    "text_length": Moves(16, gamma=1.0),
    "missing_eos": Moves("replace"),
    "missing_eos_penalty": Moves(3.0, missing_eos="subtract", normalize_scores="none", score_clip=None),
    "score_clip": Moves(0.5),
    "normalize_scores": Moves("batch", score_clip=2.0),
    "kl_budget": at("stages/test_ppo", "a_spent_kl_budget_ends_training_and_keeps_the_policy"),
    "ema_decay": Moves(0.5),
    "reference": at("stages/test_ppo_inputs", "kl_is_measured_from_the_configured_reference"),
    "tolerance": at("stages/test_exactness", "ppo_stops_when_sampler_and_policy_disagree"),
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
        TRAINED | {"reference": at("stages/test_preferences", "the_configured_reference_is_read")},
    ),
    RejectionSamplingStage: (
        rejection,
        TRAINED
        | {
            "packing": Moves(64),
            "select": Moves("random_per_prompt"),
            "missing_eos": at(
                "stages/test_response_selection", "a_truncated_candidate_is_selected_by_its_treated_score"
            ),
            "missing_eos_penalty": at(
                "stages/test_response_selection", "a_truncated_candidate_is_selected_by_its_treated_score"
            ),
            "sampling_model": at(
                "stages/test_rejection_sampling", "the_sampling_policy_differs_from_the_trained_model"
            ),
            "earlier": at("stages/test_rejection_sampling", "best_samples_of_earlier_rounds_are_kept_if_configured"),
            "keep_earlier": at(
                "stages/test_rejection_sampling", "best_samples_of_earlier_rounds_are_kept_if_configured"
            ),
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
    GRPOStage: (sampled(GRPOStage, GRPO, 3), ROLLED | {"max_resamples": Moves(3, reward=Idle())}),
    # The same constructor and the same code as GRPO's (test_rloo_differs_from_grpo_in_its_objective_alone).
    RLOOStage: (
        sampled(GRPOStage, GRPO, 3),
        {
            name: at("stages/test_every_hyperparameter", "rloo_differs_from_grpo_in_its_objective_alone")
            for name in [*ROLLED, "max_resamples"]
        },
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
    "encoder of Relative": at("stages/test_contrasts", "the_configured_encoder_embeds_the_prompts"),
    "encoder of RelativeUnpaired": at("stages/test_contrasts", "the_configured_encoder_embeds_the_prompts"),
    "kl_horizon of PPO": Moves(100.0, kl_target=0.01),
    "kl_target of PPO": Moves(0.01),
    "correction_max of CorrectsSampler": Moves(0.01, sampler_correction="sequence_truncate"),
    "correction_min of CorrectsSampler": Moves(0.9, sampler_correction="sequence_truncate"),
    "kl_in of GRPO": Moves("reward", beta=0.1),
    "margin of Pairwise": Moves({"better": 0.7}),
}


# -- samplers, rewards, annotators -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """Function that computes the result of an option, and the entries of its hyperparameters."""

    outcome: Callable[..., Any]
    entries: dict[str, Entry]


@cache
def policy() -> Any:
    model = tiny_model()
    bias = torch.zeros(model.config.vocab_size)
    bias[model.end_id] = 3.0  # ends its turns soon
    model.base.get_output_embeddings().bias = torch.nn.Parameter(bias, requires_grad=False)
    return model


def responses(kind: type[AncestralSampler], **hyperparameters: Any) -> Any:
    prompts = rollout(["What is two plus two?", "And four?"], ["", ""]).prompts
    found = kind(**{"max_new_tokens": 6, "samples": 4, **hyperparameters}).sample(policy(), prompts, seed=1)
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


def judged(kind: type, **hyperparameters: Any) -> Any:
    if kind is RewardAnnotator:
        hyperparameters = {"reward": FunctionReward(f"{__name__}:points")} | hyperparameters
    asked = data("prompt", 16, 2).train[:6]
    prompts = [prompt for prompt in asked for _ in range(3)]
    texts = ["No.", "I cannot help you to harm somebody, sorry.", "Ben lives in Rome, of course."] * 6
    made = rollout(["?"] * 18, texts)
    made.prompts[:] = prompts
    return [(x.responses, x.grades) for x in kind(**hyperparameters)(made, samples=3, seed=0)]


def points(prompt: Any, response: str, more: float = 0.0, each: float = 0.1) -> float:
    """Score a response by a rule."""
    return each * len(response) + more


TAGS: list[tuple[str, ...]] = [("unsafe",), (), (), (), ()]


def scored(kind: type, **hyperparameters: Any) -> Any:
    if kind is GoldReward:
        made = rollout(["?"] * 16, ["I cannot help with that."] * 16)
        made.prompts[:] = data("prompt", 16, 2).train
        return kind(**hyperparameters)(made).tolist()
    made = rollout(["2 + 2?"] * 5, ["It is four, or 4.", "#### 7", "nothing", "So 4 of 5.", "4"])
    prompts = [type(prompt)(prompt.messages, tags, "4") for prompt, tags in zip(made.prompts, TAGS, strict=True)]
    made.prompts[:] = prompts
    if kind is GatedReward:
        fixed = [FunctionReward(f"{__name__}:points", {"each": 0.001 * i, "more": 0.2 * i}) for i in (2, 1)]
        hyperparameters = {"helpfulness": fixed[0], "safety": fixed[1]} | hyperparameters
    if kind is WeightedReward:
        hyperparameters = {"rewards": {"rule": FunctionReward(f"{__name__}:points")}} | hyperparameters
    if kind is FunctionReward:
        hyperparameters = {"function": f"{__name__}:points"} | hyperparameters
    return kind(**hyperparameters)(made).tolist()


OF_THE_TOOLS = at("stages/test_every_hyperparameter", "every_hyperparameter_of_the_tools_has_an_effect")
JUDGE = "annotators/test_judge"
OPTIONS: dict[str, Given] = {
    "rlhf.sampler.ancestral.AncestralSampler": Given(responses, shared(precision=Moves("bf16"))),
    "rlhf.sampler.best_of_k.BestOfK": Given(responses, shared(temperatures=Moves([0.5, 1.5]))),
    "rlhf.sampler.tool_calls.ToolSampler": Given(
        responses,
        dict.fromkeys([*shared(), "tools", "max_calls", "max_result_tokens"], OF_THE_TOOLS),
    ),
    "rlhf.reward.gold.GoldReward": Given(scored, {"aspect": Moves("safety")}),
    "rlhf.reward.model.ModelReward": Given(
        scored,
        {
            "path": at("stages/test_rewards", "a_reward_model_reads_the_text_in_its_own_tokens"),
            "batch_size": at(
                "stages/test_every_hyperparameter", "the_batch_size_of_a_reward_model_does_not_change_scores"
            ),
        },
    ),
    "rlhf.reward.function.FunctionReward": Given(
        scored,
        {
            "function": at("stages/test_rewards", "a_rule_takes_arguments"),
            "arguments": Moves({"more": 2.0}),
        },
    ),
    "rlhf.reward.exact_match.ExactMatch": Given(
        scored,
        {
            "extract": Moves("whole"),
            "pattern": Moves("of (5)", extract="regex", pattern="So (4)"),
            "numbers": at("stages/test_exact_match", "exact_match_scores_by_hand"),
            "correct": Moves(2.0),
            "wrong": Moves(-1.0),
            "missing": Moves(-1.0),
        },
    ),
    "rlhf.reward.combined.GatedReward": Given(
        scored,
        {
            "helpfulness": at("stages/test_rewards", "the_gate_reads_the_sigmoid_of_safety"),
            "safety": at("stages/test_rewards", "the_gate_reads_the_sigmoid_of_safety"),
            "threshold": Moves(0.6),
            "eps": Moves(0.45),
            "scale": Moves("probability"),
        },
    ),
    "rlhf.reward.combined.WeightedReward": Given(
        scored,
        {
            "rewards": at("stages/test_rewards", "rewards_are_summed_by_weight"),
            "weights": Moves({"rule": 0.5}, weights={"rule": 1.0}),
        },
    ),
    "rlhf.annotator.gold.GoldAnnotator": Given(judged, {"noise": Moves(2.0), "aspect": Moves("helpfulness")}),
    "rlhf.annotator.reward.RewardAnnotator": Given(
        judged,
        {
            "reward": at("stages/test_every_hyperparameter", "every_hyperparameter_of_an_option_has_an_effect"),
            "thresholds": Moves((0.1, 5.0, 9.0)),
            "tie": Moves(1.5),
        },
    ),
    "rlhf.annotator.judge.JudgeAnnotator": Given(
        judged,
        {
            "path": at(JUDGE, "question_template_and_judge_are_in_the_cache_key"),
            "template": at(JUDGE, "question_template_and_judge_are_in_the_cache_key"),
            "answer": at(JUDGE, "thresholds_set_grades_and_written_answers_have_none"),
            "both_orders": at(JUDGE, "one_order_halves_the_questions_and_measures_no_bias"),
            "thresholds": at(JUDGE, "thresholds_set_grades_and_written_answers_have_none"),
            "least_mass": at(JUDGE, "an_untrained_model_is_refused_as_a_judge"),
            "max_unreadable": at(JUDGE, "too_many_unreadable_answers_are_refused_in_one_line"),
            "max_new_tokens": at(JUDGE, "max_new_tokens_and_dtype_reach_the_judge"),
            "batch_size": at(JUDGE, "log_odds_are_those_of_the_next_token_at_any_batch_size"),
            "dtype": at(JUDGE, "max_new_tokens_and_dtype_reach_the_judge"),
            "cache": at(JUDGE, "the_cache_can_be_disabled"),
        },
    ),
}
