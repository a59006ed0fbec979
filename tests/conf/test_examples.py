"""Commands that the README shows, up to training: composed, validated, planned."""

import pytest

from rlhf.planning.plan import plan
from rlhf.planning.validation.config import validate_config


@pytest.mark.parametrize("margin", ["none", "small", "large"])
def test_the_margin_of_the_helpful_reward_model_is_swept_in_every_round(composed, margin):
    word = f"reward_model_helpful.objective.margin={margin}"
    steps = plan(composed("pipeline=llama2_chat", word), [word]).steps
    found = {step.name: step.config["objective"]["margin"] for step in steps if step.name.startswith("reward_model_h")}
    assert found == {f"reward_model_helpful_{index}": margin for index in range(1, 6)}


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("beta", [0.01, 0.05])
def test_beta_and_adapter_are_swept_over_a_pipeline(composed, adapter, beta):
    words = [f"align.objective.beta={beta}", f"adapter={adapter}"]
    steps = {step.name: step.config for step in plan(composed("pipeline=instructgpt", *words), words).steps}
    assert list(steps) == ["pretrain", "sft", "collect", "reward_model", "align"]
    assert steps["align"]["objective"]["beta"] == beta
    kinds = {name: config["adapter"]["_target_"].rpartition(".")[2] for name, config in steps.items()}
    expected = "NoAdapter" if adapter == "none" else "LoRA"
    assert kinds == {name: "NoAdapter" if name == "pretrain" else expected for name in steps}


def test_the_algorithm_and_its_objective_are_swapped_by_override(composed):
    words = ["stage@align=dpo", "objective@align.objective=ipo"]
    steps = plan(composed("pipeline=instructgpt", *words), words).steps
    assert [step.name for step in steps] == ["pretrain", "sft", "collect", "align"]
    assert steps[-1].config["objective"]["_target_"].endswith("IPO")


@pytest.mark.parametrize(
    "words",
    [
        "stage=sft model=smollm2_135m adapter=lora data=alpaca",
        "stage=ppo inputs.policy=a inputs.reward_model=b objective.beta=0.02 objective.gamma=27.8 precision=bf16",
    ],
)
def test_single_stages_pass_every_check(composed, words):
    validate_config(composed(*words.split()))
