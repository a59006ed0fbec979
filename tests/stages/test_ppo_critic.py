"""Critic of PPO: its initial weights, and its trained parameters."""

import json

import pytest
import torch

from rlhf.data.collate import TokenBatch
from rlhf.models.scalar import ScalarModel
from rlhf_ppo.stage import PPOStage

from .conftest import fit, same, weights
from .test_exactness import Stop
from .test_ppo import varied


@pytest.fixture
def scorer(load, tmp_path) -> ScalarModel:
    """Save a reward model in ``tmp_path / "reward"``."""
    torch.manual_seed(3)
    model = ScalarModel.load(load())
    model.scale.fill_(2.0)
    model.bias.fill_(0.5)
    model.save(tmp_path / "reward")
    return model


def inputs_of(stage: PPOStage) -> TokenBatch:
    rollout = stage.sampler.sample(stage.policy, stage.data.train[:4], 0)
    return rollout.tokens


@pytest.mark.parametrize("lora", [False, True])
def test_the_critic_starts_from_the_reward_model(lora, scorer, load, tmp_path):
    """At the last token its value is the score, normalisation included; the zero head gives 0 everywhere."""
    stage = varied(load, lora=lora, value=str(tmp_path / "reward"))
    inputs = inputs_of(stage)
    last = (inputs.attention_mask * torch.arange(inputs.ids.shape[1])).argmax(1, keepdim=True)
    torch.testing.assert_close(stage.critic.values(inputs).gather(1, last)[:, 0], scorer.scores(inputs))
    assert varied(load, lora=lora).critic.values(inputs).eq(0).all()


@pytest.mark.parametrize("start", ["reward", None])
def test_with_an_adapter_the_critic_trains_its_own_adapter_and_its_head(start, scorer, load, tmp_path):
    value = start and str(tmp_path / start)

    def make() -> PPOStage:
        return varied(load, lora=True, value=value)

    stage = make()
    before = weights(stage)
    metrics = fit(stage, tmp_path / "whole")
    after = weights(stage)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    critic = {name for name in moved if name.startswith("critic.")}
    assert {name for name in critic if ".lora_" not in name} == {"critic.head.weight"}
    adapted = {name for name in after if name.startswith("critic.") and ".lora_" in name}
    assert adapted and adapted < critic
    # The optimizer and the checkpoint hold adapters and a head alone.
    trained = {name for name in after if ".lora_" in name or name == "critic.head.weight"}
    optimized = {id(p) for group in stage.optimizers().param_groups for p in group["params"]}
    assert optimized == {id(p) for name, p in stage.named_parameters() if name in trained}

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(make(), tmp_path / "killed", callbacks=[Stop(2, tmp_path / "killed")])
    (checkpoint,) = (tmp_path / "killed" / "checkpoints").glob("*.ckpt")
    assert set(torch.load(checkpoint, weights_only=False)["state_dict"]) & set(after) == trained
    resumed = make()
    assert fit(resumed, tmp_path / "killed", resume=checkpoint) == metrics
    assert same(weights(resumed), after)


def test_the_critic_and_its_adapter_are_saved_beside_the_policy(scorer, load, tmp_path):
    stage = varied(load, lora=True, value=str(tmp_path / "reward"))
    fit(stage, tmp_path / "run")
    stage.save(tmp_path / "run" / "model")
    inputs = inputs_of(stage)
    stage.eval()
    loaded = ScalarModel.load(tmp_path / "run" / "critic").eval()
    torch.testing.assert_close(loaded.values(inputs), stage.critic.values(inputs), atol=1e-5, rtol=1e-4)
    kinds = [
        json.loads((tmp_path / "run" / folder / "adapter_config.json").read_text())["task_type"]
        for folder in ("adapter", "critic/adapter")
    ]
    assert kinds == ["CAUSAL_LM", None]  # the policy's task type is not the critic's
