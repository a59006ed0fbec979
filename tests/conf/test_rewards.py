"""Combined rewards as they are typed."""

from collections.abc import Callable

import pytest
from omegaconf import DictConfig

from rlhf import config as configs
from rlhf import validation
from rlhf.errors import UserError


@pytest.mark.parametrize(
    ("words", "roles", "value"),
    [
        (["reward=gated"], {"reward_model", "safety_model"}, "R"),
        (["reward=gated", "reward@reward.safety=gold", "reward.safety.aspect=safety"], {"reward_model"}, "R"),
        (
            [
                "reward=weighted",
                "+reward@reward.rewards.rule=function",
                "reward.rewards.rule.function=operator:contains",
            ]
            + ["+reward.weights.rule=0.1"],
            {"reward_model"},
            "R",
        ),
        (["reward=safety"], {"safety_model"}, "S"),
        (["reward=gold"], set(), None),
        (["reward=gated", "stage.value=null"], {"reward_model", "safety_model"}, None),
    ],
)
def test_roles_and_the_start_of_the_critic(
    composed: Callable[..., DictConfig], words: list[str], roles: set[str], value: str | None
) -> None:
    config = composed("stage=ppo", "inputs.policy=P", "inputs.reward_model=R", "inputs.safety_model=S", *words)
    validation.check(config)
    assert config.stage.value == value
    read = configs.roles_read(configs.plain(config))
    assert read & {"reward_model", "safety_model"} == roles


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("reward.threshold=1.5", "reward.threshold=1.5: should be less than or equal to 1"),
        ("reward.eps=0.0", "reward.eps=0.0: should be greater than 0"),
        ("reward.scale=sigmoid", "reward.scale=sigmoid: should be 'logit' or 'probability'"),
        ("objective.beta=-1", "objective.beta=-1: should be greater than or equal to 0"),
        ("stage.kl_budget=0", "stage.kl_budget=0: should be greater than 0"),
        ("stage.average=1.0", "stage.average=1.0: should be less than 1"),
        ("stage.missing_end=drop", "stage.missing_end=drop: should be 'auto', 'replace', 'subtract' or 'none'"),
        ("stage.normalize_scores=yes", "stage.normalize_scores="),
    ],
)
def test_a_wrong_value_is_one_line(composed: Callable[..., DictConfig], word: str, line: str) -> None:
    roles = [f"inputs.{role}=given" for role in ("policy", "reward_model", "safety_model")]
    with pytest.raises(UserError) as error:
        validation.check(composed("stage=ppo", "reward=gated", *roles, word))
    assert str(error.value).startswith(line) and "\n" not in str(error.value)
