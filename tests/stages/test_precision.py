"""Optimizer step in 16 bits: Lightning's own call order with a gradient scaler, on the CPU."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import FSDPStrategy

from rlhf.errors import RunFailed, UserError
from rlhf.models.half_weights import HalfWeights
from rlhf.models.optimizers import adamw as adamw_of_the_library
from rlhf.objective import CrossEntropy
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.stage.checks import check_resolution
from rlhf.storage.metrics_file import read_rows
from rlhf_grpo.objective import GRPO
from rlhf_grpo.stage import GRPOStage
from rlhf_sft.stage import SFTStage

from .conftest import Scored, adamw, constant, data, fit, weights
from .hyperparameters import Idle
from .test_ppo import varied, watched

CONF = Path(__file__).parents[2] / "conf" / "optimizer"


def fp16(scale: float, backoff: float = 0.5) -> MixedPrecision:
    """Return the plugin that ``precision=fp16`` gives on a GPU."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=backoff))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


def sft(load: Any, optimizer: Any = sgd, **hyperparameters: Any) -> SFTStage:
    parts = (load(), CrossEntropy(), data("demonstration", 32, 2), optimizer, constant)
    return SFTStage(*parts, **{"batch_size": 8, "epochs": 1, **hyperparameters})


def moved(stage: Any, before: dict[str, torch.Tensor]) -> float:
    """Return the norm of what training changed."""
    now = weights(stage)
    return sum((now[name] - value).square().sum() for name, value in before.items()) ** 0.5


@pytest.mark.parametrize("micro", [None, 3])
def test_the_gradient_is_clipped_without_its_loss_scale(micro, load, tmp_path):
    """With SGD at a rate of 1 a step is as long as the clipped gradient, whatever the loss was multiplied by."""
    stage = sft(load, gradient_clip=0.01, micro_batch_size=micro)
    before = weights(stage)
    metrics = fit(stage, tmp_path, plugins=[fp16(1024.0)], limit_train_batches=1, limit_val_batches=0)
    assert moved(stage, before) == pytest.approx(0.01, rel=1e-3)
    assert metrics["skipped_steps"] == 0 and metrics["loss_scale"] == 1024
    plain = fit(sft(load), tmp_path / "fp32", limit_train_batches=1, limit_val_batches=0)
    assert metrics["gradient_norm"] == pytest.approx(plain["gradient_norm"], rel=0.02)
    assert "skipped_steps" not in plain


def test_adamw_is_not_fused_where_gradients_have_a_loss_scale(load, tmp_path):
    """A fused update divides out the loss scale itself, after clipping."""
    made: list[Any] = []

    def make(parameters: Any, fused: bool = True) -> torch.optim.Optimizer:
        made.append(adamw_of_the_library(parameters, lr=1e-3, fused=fused))
        return made[-1]

    scaled = fit(sft(load, make), tmp_path, plugins=[fp16(1024.0)], limit_train_batches=1, limit_val_batches=0)
    plain = fit(sft(load, make), tmp_path / "fp32", limit_train_batches=1, limit_val_batches=0)
    assert [bool(optimizer.param_groups[0]["fused"]) for optimizer in made] == [False, True]
    assert scaled["gradient_norm"] == pytest.approx(plain["gradient_norm"], rel=0.02)


def test_a_step_whose_gradient_overflows_is_skipped_and_logged(load, tmp_path):
    stage = sft(load, adamw)
    before = weights(stage)
    fit(stage, tmp_path, plugins=[fp16(2.0**40, 2.0**-30)], limit_val_batches=0)
    rows = read_rows(tmp_path / "metrics.csv")
    assert [row["skipped_steps"] for row in rows] == [1, 0, 0, 0]
    assert [row["loss_scale"] for row in rows] == [2.0**40, 1024, 1024, 1024]
    assert ["gradient_norm" in row for row in rows] == [False, True, True, True]
    assert stage.updates_done == 4 and moved(stage, before) > 0
    first = sft(load, adamw)
    fit(first, tmp_path / "one", plugins=[fp16(2.0**40)], limit_train_batches=1, limit_val_batches=0)
    assert moved(first, before) == 0


def test_the_ema_skips_a_step_whose_gradient_overflows(load, tmp_path):
    """A rollout's row has the share of updates that were skipped, and means over the others."""
    stage = varied(load, ema_decay=0.5, steps=1)
    before = weights(stage)
    plugins = [fp16(2.0**40, 2.0**-30)]
    metrics = fit(stage, tmp_path, plugins=plugins, limit_val_batches=0)
    assert metrics["skipped_steps"] == 0.25 and metrics["gradient_norm"] > 0
    half = {name: value for name, value in before.items() if name.startswith("policy.")}
    stage = varied(load, ema_decay=0.5, steps=1, epochs=1, minibatches=1)
    fit(stage, tmp_path / "one", plugins=[fp16(2.0**40)], limit_val_batches=0)
    assert all(torch.equal(stage.ema.state[name.removeprefix("policy.")], half[name]) for name in half)


def test_without_any_gradient_no_step_is_made(load, tmp_path):
    """Where no group has spread, the scaler has no gradient to inspect."""
    parts = (data("prompt", 8, 2), None, Idle(), AncestralSampler(4, samples=2), adamw, constant)
    idle = GRPOStage(load(), GRPO(drop_zero_spread=True), *parts, batch_size=4, steps=2)
    idle.reward = Scored(lambda rollout: torch.ones(len(rollout.texts)))
    before = weights(idle)
    metrics = fit(idle, tmp_path, plugins=[fp16(1024.0)], limit_val_batches=0)
    assert metrics["zero_spread"] == 1 and moved(idle, before) == 0


def test_an_overflow_at_loss_scale_one_stops_the_run(load, tmp_path):
    stage = sft(load)
    stage.objective = lambda logp: (-logp * 1e30, {})
    with pytest.raises(RunFailed, match="overflow in 16 bits at a loss scale of 1,.*precision=bf16"):
        fit(stage, tmp_path, plugins=[fp16(1.0)], limit_val_batches=0)


def test_a_non_finite_gradient_stops_the_run_before_it_changes_a_weight(load, tmp_path):
    """The loss may be finite: sqrt has an infinite slope at 0."""
    stage = sft(load)
    stage.objective = lambda logp: ((logp * 0).sqrt(), {})
    before = weights(stage)
    with pytest.raises(RunFailed, match="the gradient of the loss became nan at batch 0"):
        fit(stage, tmp_path, limit_val_batches=0)
    assert moved(stage, before) == 0


@pytest.mark.parametrize(("lr", "moves"), [(1e-5, False), (1e-3, True)])
def test_16_bit_weights_that_the_learning_rate_cannot_move_are_refused(lr, moves, load, tmp_path):
    """0.02 is 0.02002 in bf16, and its neighbours are 1.2e-4 away: 200 steps of 1e-5 do not move it."""
    weight = torch.nn.Parameter(torch.full((4,), 0.02, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([weight], lr=lr, weight_decay=0.0)
    for _ in range(200):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert (weight[0].item() != pytest.approx(0.02, rel=2e-3)) == moves
    stage = sft(load, lambda parameters: torch.optim.AdamW(parameters, lr=lr))
    if moves:
        fit(stage, tmp_path, precision="bf16-true", limit_train_batches=1, limit_val_batches=0)
    else:
        with pytest.raises(
            UserError, match=r"optimizer.lr=1e-05: is too small for precision=bf16_true.*type precision=bf16 "
        ):
            fit(stage, tmp_path, precision="bf16-true", limit_val_batches=0)
        fit(sft(load, adamw), tmp_path / "mixed", precision="bf16-mixed", limit_train_batches=1, limit_val_batches=0)


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_optimizer_loses_updates_in_16_bits_exactly_where_it_is_refused(file):
    """200 steps with a constant gradient, after 100 in which the moments of RMSprop and Adam become constant."""
    node = OmegaConf.load(file)
    for lr, moves in ((1e-5, False), (1e-3, True)):
        node.lr, node.weight_decay = lr, 0.0
        weight = torch.nn.Parameter(torch.full((64, 128), 0.02, dtype=torch.bfloat16))
        optimizer = instantiate(node)([weight])
        for step in range(300):
            if step == 100:
                with torch.no_grad():
                    weight.fill_(0.02)
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        assert (weight[0, 0].item() != pytest.approx(0.02, rel=2e-3)) == moves
        fresh = instantiate(node)([torch.nn.Parameter(torch.full((64, 128), 0.02, dtype=torch.bfloat16))])
        with nullcontext() if moves else pytest.raises(UserError, match="optimizer.lr=1e-05"):
            check_resolution([fresh])


def test_a_fresh_adapter_is_judged_by_its_half_with_values(load, tmp_path):
    """B starts at 0, which any update changes; A is as lost as any other weight."""
    parts = (CrossEntropy(), data("demonstration", 32, 2))
    stage = SFTStage(load(lora=True), *parts, lambda p: torch.optim.AdamW(p, lr=1e-5), constant, batch_size=8, epochs=1)
    with pytest.raises(UserError, match=r"optimizer.lr=1e-05: is too small for precision=bf16_true"):
        fit(stage, tmp_path, precision="bf16-true", limit_val_batches=0)


@pytest.mark.parametrize("lora", [False, True])
def test_with_16_bit_weights_all_else_stays_float32(lora, load, tmp_path):
    """Uniform numbers, log-probabilities, advantages and weights of examples are those of fp32."""
    drawn = []

    class Drawing(AncestralSampler):
        def _noise(self, rows: int, columns: int, seed: int) -> torch.Tensor:
            drawn.append(super()._noise(rows, columns, seed))
            return drawn[-1]

    for precision in ("32-true", "bf16-true"):
        stage = watched(load, sampler=Drawing(10), lora=lora, steps=1)
        before = weights(stage)
        metrics = fit(stage, tmp_path / precision, precision=precision, limit_val_batches=0)
        assert moved(stage, before) > 0
        ((rollout, scores, experience),) = stage.seen
        found = (rollout.logp, scores, experience.advantages, experience.returns)
        assert {values.dtype for values in found} == {torch.float32}
        assert metrics["learning_rate"] == pytest.approx(1e-3, rel=1e-6)
    assert {p.dtype for p in stage.policy.parameters()} == {torch.bfloat16}
    first, second = drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_weights_of_examples_are_not_rounded_to_16_bits(load, tmp_path):
    """Each of three pairs of a prompt has weight 1/3, which is 0.33398 in 16 bits."""
    plugin = HalfWeights("bf16-true")
    batch = {"weight": torch.full((3,), 1 / 3)}
    assert plugin.convert_input(batch)["weight"] is batch["weight"]
    with plugin.forward_context():
        assert torch.zeros(1).dtype == torch.float32
    assert plugin.convert_module(torch.nn.Linear(2, 2)).weight.dtype == torch.bfloat16


def test_a_sharded_strategy_is_refused(load):
    stage = sft(load)
    stage._trainer = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(UserError, match="trainer.strategy=FSDPStrategy.*type trainer=ddp or trainer=fsdp"):
        stage.on_fit_start()
