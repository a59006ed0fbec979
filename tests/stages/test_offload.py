"""Offloaded frozen models: on the device only while they score, and the same run bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.models import offload
from rlhf.models.scalar import ScalarModel
from rlhf.planning.validation.config import validate_config
from rlhf.reward.model import ModelReward
from rlhf.testing import compose_config

from .conftest import fit, same, weights
from .test_ppo import varied


def ppo(load: Any, lora: bool = False, **hyperparameters: Any) -> Any:
    stage = varied(load, lora=lora, steps=2, **hyperparameters)
    reward = ModelReward("in memory")
    torch.manual_seed(5)
    reward._model = ScalarModel(load()).eval().requires_grad_(False)
    stage.reward = reward
    return stage


@pytest.mark.parametrize("lora", [False, True])
def test_frozen_models_are_on_the_device_only_while_they_score(
    lora: bool, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is a second copy in main memory; with an adapter the reference is the policy and stays."""

    def on_device(tensor: Tensor, device: torch.device) -> Tensor:
        moved = tensor.clone()
        addresses.add(moved.data_ptr())
        return moved

    addresses: set[int] = set()
    monkeypatch.setattr(offload, "copy_to", on_device)
    plain, stage = ppo(load, lora), ppo(load, lora, offload_frozen=True)
    seen: dict[str, list[tuple[bool, ...]]] = {"reference": [], "reward": [], "update": [], "sample": []}
    reward, reference = stage.reward.model, stage.reference.modules[0]

    def watch(holder: Any, method: str, name: str) -> None:
        own = getattr(holder, method)

        def watched(*arguments: Any, **named: Any) -> Any:
            models = (reference, reward)
            seen[name].append(tuple(next(model.parameters()).data_ptr() in addresses for model in models))
            return own(*arguments, **named)

        monkeypatch.setattr(holder, method, watched)

    watch(stage.reference, "logprobs", "reference")
    watch(reward, "scores", "reward")
    watch(stage, "update", "update")
    watch(stage.sampler, "sample", "sample")
    expected = fit(plain, tmp_path / "plain", limit_val_batches=0)
    assert fit(stage, tmp_path / "offloaded", limit_val_batches=0) == expected
    assert same(weights(stage), weights(plain))
    assert set(seen["reference"]) == {(not lora, False)}
    assert set(seen["reward"]) == {(False, True)}
    assert set(seen["update"]) == set(seen["sample"]) == {(False, False)} and len(seen["update"]) == 8


def test_weights_and_buffers_have_a_copy_inside_and_their_own_memory_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "copy_to", lambda tensor, device: tensor + 1)  # to recognise the copy
    model = torch.nn.BatchNorm1d(3).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    held = offload.Offload([model])
    with held.loaded(torch.device("cpu")):
        assert all(torch.equal(value, before[name] + 1) for name, value in model.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("trainer", "problem"), [("cpu", "has no effect on a CPU"), ("fsdp", "which shards the reference"), ("gpu", None)]
)
def test_offloading_is_refused_where_it_has_no_effect(trainer: str, problem: str | None) -> None:
    words = ["stage=grpo", "inputs.policy=given", "inputs.reward_model=given", "stage.offload_frozen=true"]
    config = compose_config(*words, f"trainer={trainer}", *(["trainer.accelerator=gpu"] if trainer == "fsdp" else []))
    try:
        validate_config(config)
        found = ""
    except UserError as error:
        found = str(error)
    assert (problem or "nothing") in found or (problem is None and "offload" not in found)
