"""Combined rewards on the command line."""

from collections.abc import Callable

import pytest
from omegaconf import DictConfig

from rlhf.errors import UserError
from rlhf.planning import step_config as configs
from rlhf.planning.validation.config import validate_config
from rlhf.storage.plain import plain


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
def test_the_reward_decides_the_roles_read_and_the_start_of_the_critic(
    composed: Callable[..., DictConfig], words: list[str], roles: set[str], value: str | None
) -> None:
    config = composed("stage=ppo", "inputs.policy=P", "inputs.reward_model=R", "inputs.safety_model=S", *words)
    validate_config(config)
    assert config.stage.value == value
    read = configs.roles_read(plain(config))
    assert read & {"reward_model", "safety_model"} == roles


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("reward.threshold=1.5", "reward.threshold=1.5: should be less than or equal to 1"),
        ("reward.eps=0.0", "reward.eps=0.0: should be greater than 0"),
        ("reward.scale=sigmoid", "reward.scale=sigmoid: should be 'logit' or 'probability'"),
        ("objective.beta=-1", "objective.beta=-1: should be greater than or equal to 0"),
        ("stage.kl_budget=0", "stage.kl_budget=0: should be greater than 0"),
        ("stage.ema_decay=1.0", "stage.ema_decay=1.0: should be less than 1"),
        ("stage.missing_eos=drop", "stage.missing_eos=drop: should be 'auto', 'replace', 'subtract' or 'none'"),
        ("stage.normalize_scores=yes", "stage.normalize_scores="),
    ],
)
def test_a_wrong_value_is_reported_in_one_line(composed: Callable[..., DictConfig], word: str, line: str) -> None:
    roles = [f"inputs.{role}=given" for role in ("policy", "reward_model", "safety_model")]
    with pytest.raises(UserError) as error:
        validate_config(composed("stage=ppo", "reward=gated", *roles, word))
    assert str(error.value).startswith(line) and "\n" not in str(error.value)
