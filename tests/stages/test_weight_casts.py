"""Kept 16-bit copies of weights give the bits of plain autocast: metrics, weights, EMA, checkpoint, resumed run."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.callbacks.checkpoints import Checkpoints, latest
from rlhf.data.collate import TokenBatch
from rlhf.models.optimizers import adamw, adamw_8bit
from rlhf.models.weight_casts import CachedLinear, forget_casts, keep_casts, kept_casts
from rlhf.stage.base import Stage
from rlhf_ppo.objective import PPO

from .conftest import fit, same, weights
from .test_ppo import varied

BF16 = torch.bfloat16
OPTIMIZERS = {"fused": adamw, "plain": lambda parameters, lr: adamw(parameters, lr, fused=False), "8bit": adamw_8bit}


def ppo(load: Any, kept: bool, optimizer: str = "fused", **hyperparameters: Any) -> Stage:
    """Build PPO with critic, reference, EMA, pretraining term, clipping and several updates on each rollout."""
    stage = varied(load, PPO(gamma=0.5), ema_decay=0.5, micro_batch_size=2, **hyperparameters)
    stage._optimizer = lambda parameters: OPTIMIZERS[optimizer](parameters, lr=1e-3)
    if kept:
        keep_casts(stage.models(), BF16)
    return stage


@pytest.mark.parametrize(("lora", "optimizer"), [(False, "fused"), (True, "plain"), (False, "8bit")])
def test_training_has_the_bits_of_plain_autocast(lora: bool, optimizer: str, load: Any, tmp_path: Path) -> None:
    """A fused or 8-bit optimizer changes weights without autograd's version counter."""
    plain, kept = (ppo(load, kept, optimizer, lora=lora, steps=1) for kept in (False, True))
    before = weights(plain)
    metrics = [fit(stage, tmp_path / str(id(stage)), precision="bf16-mixed") for stage in (plain, kept)]
    assert metrics[0] == metrics[1] and metrics[0]["gradient_norm"] > 0
    assert not same(weights(plain), before) and same(weights(plain), weights(kept))
    assert {weight.dtype for weight in kept.policy.parameters()} == {torch.float32}
    assert plain.ema is not None and kept.ema is not None
    assert all(torch.equal(value, kept.ema.state[name]) for name, value in plain.ema.state.items())
    copies = kept_casts(kept.policy, BF16)
    assert copies and {copy.dtype for copy in copies} == {BF16}


def test_a_run_with_kept_copies_resumes_bit_for_bit(load: Any, tmp_path: Path) -> None:
    """A checkpoint has no copies: a run with them goes on from one without them."""
    whole = ppo(load, kept=True, steps=2)
    expected = fit(whole, tmp_path, precision="bf16-mixed", limit_val_batches=0)
    saving = {"callbacks": [Checkpoints(every_n_batches=1, keep=1)], "enable_checkpointing": True}
    shared = {"precision": "bf16-mixed", "limit_val_batches": 0}
    fit(ppo(load, kept=False, steps=2), tmp_path / "killed", limit_train_batches=1, **saving, **shared)
    resumed = ppo(load, kept=True, steps=2)
    assert fit(resumed, tmp_path / "again", resume=latest(tmp_path / "killed"), **shared) == expected
    assert same(weights(resumed), weights(whole))


def batch(model: Any) -> TokenBatch:
    ids = torch.arange(24).view(2, 12) % model.config.vocab_size
    return TokenBatch.of(ids, torch.ones_like(ids), torch.ones_like(ids))


def autocast() -> torch.autocast:
    return torch.autocast("cpu", BF16, cache_enabled=False)


def test_a_copy_is_renewed_only_when_its_weight_changes(load: Any) -> None:
    model = load()
    keep_casts([model], BF16)
    layer = next(part for part in model.modules() if isinstance(part, CachedLinear))
    with autocast(), torch.no_grad():
        first = layer.computed_weight()
        first.fill_(3.0)  # to recognise the copy
        assert (layer.computed_weight() == 3.0).all()
        layer.weight.mul_(2)
        assert torch.equal(layer.computed_weight(), layer.weight.bfloat16())
        layer.weight.data.mul_(2)  # an update without the version counter
        assert not torch.equal(layer.computed_weight(), layer.weight.bfloat16())
        forget_casts(model)
        assert torch.equal(layer.computed_weight(), layer.weight.bfloat16())
        own, layer.weight.data = layer.weight.data, -layer.weight.data  # as the EMA does
        assert torch.equal(layer.computed_weight(), layer.weight.bfloat16())
        layer.weight.data = own
        assert torch.equal(layer.computed_weight(), own.bfloat16())
    assert layer.computed_weight() is layer.weight  # without autocast


def test_a_frozen_model_is_stored_in_16_bits(load: Any) -> None:
    """All but its tied embedding and its vectors, which autocast reads in float32: the same log-probabilities."""
    plain = load().frozen()
    kept = copy.deepcopy(plain)
    keep_casts([kept], BF16)
    found = {name: weight.dtype for name, weight in kept.named_parameters()}
    assert {name for name, dtype in found.items() if dtype is BF16} == {
        name for name, weight in plain.named_parameters() if weight.ndim == 2 and "embed" not in name
    }
    with autocast(), torch.no_grad():
        assert torch.equal(plain.logprobs(batch(plain))[0], kept.logprobs(batch(kept))[0])
    with torch.no_grad():  # outside of autocast too, with the rounded weights
        torch.testing.assert_close(plain.logprobs(batch(plain))[0], kept.logprobs(batch(kept))[0], atol=0.05, rtol=0.05)


def test_layers_that_share_a_weight_share_its_copy(load: Any) -> None:
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    second.weight = first.weight
    keep_casts([torch.nn.ModuleList([first, second])], BF16)
    with autocast():
        gradients = []
        for layer in (first, second):
            layer(torch.eye(4)).sum().backward()
            gradients.append(layer.weight.grad.clone())
    assert first.weight.copy16 is second.weight.copy16 and first.weight.grad.dtype is torch.float32
    assert torch.equal(gradients[0], torch.ones(4, 4)) and torch.equal(gradients[1], torch.full((4, 4), 2.0))
    assert not hasattr(copy.deepcopy(first).weight, "copy16")  # a copy of the model takes no copies along
