"""YAML of each objective: its class, its defaults, its comments."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pydantic import ConfigDict, ValidationError, create_model

from rlhf.objective import Objective

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("conf/objective/*.yaml"), *ROOT.glob("plugins/rlhf_*/conf/objective/*.yaml")])


def test_all_objectives_are_found():
    names = {path.stem for path in FILES}
    assert len(names) == len(FILES) >= 20
    assert {"cross_entropy", "pairwise", "ppo", "dpo", "ipo", "simpo", "orpo", "kto", "relative"} <= names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_yaml_and_constructor_have_equal_defaults(path):
    config = OmegaConf.load(path)
    objective = instantiate(config)
    assert isinstance(objective, Objective)
    parameters = inspect.signature(type(objective)).parameters
    hyperparameters = {name: value for name, value in OmegaConf.to_container(config).items() if name != "_target_"}
    assert list(hyperparameters) == list(parameters), "same hyperparameters in the same order"
    assert hyperparameters == {name: parameter.default for name, parameter in parameters.items()}
    assert type(objective).__name__.lower() == path.stem.replace("_", "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_has_a_comment(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert all("  # " in line for line in lines if re.match(r"\w", line))


@pytest.mark.parametrize(
    "target, name, bad",
    [
        ("rlhf_dpo.objective.DPO", "beta", 0.0),
        ("rlhf_dpo.objective.DPO", "label_smoothing", 0.5),
        ("rlhf_dpo.objective.EXO", "label_smoothing", 0.0),
        ("rlhf_dpo.objective.RewardAware", "distance", "cubed"),
        ("rlhf_reward_model.objective.Pairwise", "margin", "huge"),
        ("rlhf_reward_model.objective.Pairwise", "margin", {"slighty": 1.0}),
        ("rlhf_reward_model.objective.Pairwise", "centering", -1.0),
        ("rlhf_ppo.objective.PPO", "gae_lambda", 1.5),
        ("rlhf_ppo.objective.PPO", "clip", 0.0),
        ("rlhf_ppo.objective.PPO", "kl_estimator", "k4"),
        ("rlhf_ppo.objective.PPO", "kl_target", 0.0),
    ],
)
def test_ranges_are_in_the_signature(target, name, bad):
    """Invalid values are refused by the pydantic model of the constructor, before anything is built."""
    module, _, cls = target.rpartition(".")
    parameters = inspect.signature(getattr(__import__(module, fromlist=[cls]), cls)).parameters
    fields = {key: (parameter.annotation, parameter.default) for key, parameter in parameters.items()}
    model = create_model(cls, __config__=ConfigDict(extra="forbid"), **fields)
    model()
    with pytest.raises(ValidationError):
        model(**{name: bad})


def test_a_margin_table_from_yaml_is_accepted():
    """Hydra passes a mapping of its own type."""
    path = ROOT / "plugins/rlhf_reward_model/conf/objective/pairwise.yaml"
    config = OmegaConf.merge(OmegaConf.load(path), {"margin": {"better": 2.0}})
    _, metrics = instantiate(config)(torch.ones(2), torch.zeros(2), torch.tensor([2, 3]))
    assert metrics["margin"].tolist() == [2.0, 0.0]
