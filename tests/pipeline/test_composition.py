"""Hydra places global-package stages under their step's name, and every documented override works there."""

from collections.abc import Callable

import pytest
from omegaconf import DictConfig, OmegaConf

from rlhf.planning import step_config as configs
from rlhf.storage.plain import plain, sets

Typed = Callable[..., DictConfig]


def test_a_stage_is_placed_under_the_name_of_its_step_with_its_groups(typed: Typed) -> None:
    align = typed("pipeline=instructgpt").align
    assert align.stage.name == "ppo"
    assert align.objective._target_ == "rlhf_fake.parts.Loss"
    assert align.text.record == "text" and align.data.record == "prompts"
    assert OmegaConf.to_container(align, resolve=False)["reward"]["path"] == "${inputs.reward_model}"


def test_the_algorithm_is_swapped_by_one_override(typed: Typed) -> None:
    align = typed("pipeline=instructgpt", "stage@align=dpo").align
    assert align.stage.name == "dpo"
    assert align.data.record == "comparison"
    assert not {"reward", "sampler", "text"} & set(align)


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["stage@align=dpo", "objective@align.objective=ipo"], "align.objective._target_", "rlhf_fake.parts.IPO"),
        (["reward@align.reward=gold"], "align.reward._target_", "rlhf_fake.parts.Reward"),
        (["align.objective.beta=0.01"], "align.objective.beta", 0.01),
        (["data@align.text=demonstrations"], "align.text.record", "demonstrations"),
        (["+adapter@align.adapter=lora"], "align.adapter.rank", 8),
        (["adapter@pretrain.adapter=lora"], "pretrain.adapter.rank", 8),
        (["+align.seed=3"], "align.seed", 3),
        (["compare.count=7"], "compare.count", 7),
    ],
)
def test_overrides_reach_into_a_step(typed: Typed, overrides: list[str], key: str, value: object) -> None:
    assert OmegaConf.select(typed("pipeline=instructgpt", *overrides), key) == value


@pytest.mark.parametrize("pipeline", ["instructgpt", "dpo", "llama2_chat"])
def test_a_pipeline_sets_inputs_only_and_no_hyperparameters(typed: Typed, pipeline: str) -> None:
    """Beyond the stage's own file, `align` sets its inputs alone."""
    of_pipeline = typed(f"pipeline={pipeline}", "stage@align=dpo").align
    of_stage = typed("stage=dpo")
    extra = {key for key in of_pipeline if key not in of_stage or of_pipeline[key] != of_stage[key]}
    assert extra - {"model", "optimizer"} == {"inputs"}  # the root of a single run has more of those two


@pytest.mark.parametrize(
    ("pipeline", "steps"),
    [
        ("instructgpt", ["pretrain", "sft", "collect", "reward_model", "align"]),
        ("dpo", ["pretrain", "sft", "collect", "align"]),
        (
            "llama2_chat",
            [
                "pretrain",
                "sft",
                "collect_helpfulness",
                "collect_safety",
                "reward_model_helpful",
                "reward_model_safety",
                "rejection_sampling",
                "align",
            ],
        ),
    ],
)
def test_steps_of_the_pipelines(typed: Typed, pipeline: str, steps: list[str]) -> None:
    assert list(typed(f"pipeline={pipeline}").steps) == steps


def test_the_config_of_a_step_overrides_the_root_config(typed: Typed) -> None:
    raw = configs.step_config(plain(typed("pipeline=instructgpt", "seed=5")), "align")
    assert raw["seed"] == 5
    assert raw["model"] == {
        "_target_": "rlhf_fake.parts.Model",
        "path": "${inputs.policy}",
        "architecture": {"hidden_size": 8},
    }
    assert raw["optimizer"]["lr"] == 1e-3 and "_target_" in raw["optimizer"]
    assert not {"steps", "compare", "until", "sft", "align"} & set(raw)
    assert raw["inputs"]["policy"] == "${artifact:sft}" and raw["inputs"]["value"] is None


def test_an_option_of_a_step_replaces_that_of_the_root(typed: Typed) -> None:
    root = plain(typed("pipeline=instructgpt", "adapter=lora"))
    assert configs.step_config(root, "pretrain")["adapter"] == {"_target_": "rlhf_fake.parts.Adapter"}
    assert configs.step_config(root, "sft")["adapter"]["rank"] == 8


def test_roles_read_are_those_that_the_config_names(typed: Typed) -> None:
    assert configs.roles_read(configs.step_config(plain(typed("pipeline=instructgpt")), "align")) == {
        "policy",
        "reward_model",
        "value",
    }
    swapped = typed("pipeline=instructgpt", "stage@align=dpo")
    assert configs.roles_read(configs.step_config(plain(swapped), "align")) == {"policy", "comparisons"}


def test_a_role_that_an_input_refers_to_is_read() -> None:
    raw = {
        "x": "${optional_input:reference}",
        "inputs": {"reference": "${inputs.policy}", "policy": "RUN", "text": "T"},
    }
    assert configs.roles_read(raw) == {"reference", "policy"}


def test_required_roles_name_the_key_that_reads_them(typed: Typed) -> None:
    raw = configs.step_config(plain(typed("stage=ppo")), None)
    assert configs.required_roles(raw) == {"policy": "model.path", "reward_model": "reward.path"}


def test_optional_input_resolver() -> None:
    configs.register_resolvers()
    node = {"inputs": {"policy": None}, "a": "${optional_input:policy}", "b": "${optional_input:policy,org/na-me}"}
    assert configs.resolve(node) == {"inputs": {"policy": None}, "a": None, "b": "org/na-me"}
    given = {**node, "inputs": {"policy": "RUN"}}
    assert configs.resolve(given)["a"] == configs.resolve(given)["b"] == "RUN"


def test_an_artifact_reference_outside_a_pipeline_is_refused() -> None:
    with pytest.raises(Exception, match="artifact:sft.*only in a pipeline"):
        configs.resolve({"a": "${artifact:sft}"})


@pytest.mark.parametrize(
    ("node", "key", "decides"),
    [
        ({"optimizer": {"lr": 1}}, "optimizer.lr", True),
        ({"optimizer": {"lr": 1}}, "optimizer.weight_decay", False),
        ({"optimizer": {"lr": 1}}, "optimizer", False),
        ({"adapter": {"_target_": "a"}}, "adapter.rank", True),
        ({"adapter": {"_target_": "a"}}, "adapter", True),
        ({}, "seed", False),
    ],
)
def test_keys_that_a_step_sets(node: dict, key: str, decides: bool) -> None:
    assert sets(node, key) is decides
