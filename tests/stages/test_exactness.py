"""Results do not depend on micro-batches, packing, or kills."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from rlhf.callbacks.checkpoints import save
from rlhf.data.collate import TokenBatch
from rlhf.errors import RunFailed, UserError
from rlhf.objective import CrossEntropy
from rlhf.reward.gold import GoldReward
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.stage.base import Stage
from rlhf.storage.metrics_file import read_rows
from rlhf_dpo.objective import DPO
from rlhf_dpo.stage import DPOStage
from rlhf_ppo.objective import PPO
from rlhf_ppo.stage import PPOStage
from rlhf_pretrain.stage import PretrainStage
from rlhf_reward_model.objective import Pairwise
from rlhf_reward_model.stage import RewardModelStage
from rlhf_sft.stage import SFTStage

from .conftest import adamw, constant, data, fit, same, weights

COMMON = (adamw, constant)


def sft(load, **hyperparameters) -> Stage:
    return SFTStage(
        load(), CrossEntropy(), data("demonstration"), *COMMON, **{"batch_size": 8, "epochs": 2, **hyperparameters}
    )


def pretrain(load, **hyperparameters) -> Stage:
    hyperparameters = {"batch_size": 4, "epochs": 2, "context": 64, **hyperparameters}
    return PretrainStage(load(), CrossEntropy(), data("text"), *COMMON, **hyperparameters)


def reward_model(load, **hyperparameters) -> Stage:
    hyperparameters = {"batch_size": 8, "epochs": 2, **hyperparameters}
    torch.manual_seed(3)
    return RewardModelStage(load(), Pairwise(margin="small"), data("comparison"), *COMMON, **hyperparameters)


def dpo(load, **hyperparameters) -> Stage:
    return DPOStage(load(), DPO(), data("comparison"), *COMMON, **{"batch_size": 8, "epochs": 2, **hyperparameters})


def ppo(
    load, gamma: float = 0.0, objective: PPO | None = None, text: bool = True, lora: bool = False, **hyperparameters
) -> Stage:
    hyperparameters = {"batch_size": 8, "steps": 4, "epochs": 2, "minibatches": 2, "text_length": 32, **hyperparameters}
    return PPOStage(
        load(lora),
        objective or PPO(gamma=gamma),
        data("prompt"),
        data("text") if text else None,
        GoldReward(),
        AncestralSampler(10),
        *COMMON,
        **hyperparameters,
    )


STAGES: dict[str, Callable[..., Stage]] = {
    "pretrain": pretrain,
    "sft": sft,
    "reward_model": reward_model,
    "dpo": dpo,
    "ppo": ppo,
}


@pytest.mark.parametrize("name", STAGES)
def test_micro_batches_do_not_change_the_weights(name, load, tmp_path):
    """1 x 8, 2 x 4 and 8 x 1 give the same update, although rows differ in length."""
    check_micro_batches(STAGES[name], load, tmp_path)


def check_micro_batches(make: Callable[..., Stage], load, folder: Path) -> None:
    """Compare steps of plain gradient descent, unclipped: Adam hides the scale of a gradient, clipping a large one."""
    results = []
    for size in (None, 4, 1):
        stage = make(load, micro_batch_size=size, gradient_clip=None)
        stage._optimizer = lambda groups: torch.optim.SGD(groups, lr=0.3)
        before = weights(stage)
        fit(stage, folder / str(size), limit_train_batches=2, limit_val_batches=0)
        results.append(weights(stage))
    moved = [(value - before[name]).abs().max().item() for name, value in results[0].items()]
    assert max(moved) > 3e-3
    for other in results[1:]:
        for key, value in results[0].items():
            torch.testing.assert_close(other[key], value, atol=1e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


class Stop(pl.Callback):
    """Callback that saves a checkpoint after some batches and dies, as in a kill."""

    def __init__(self, after: int, folder: Path) -> None:
        self.after, self.folder = after, folder

    def on_train_batch_end(self, trainer, stage, outputs, batch, batch_idx):
        if batch_idx + 1 == self.after:
            save(trainer, self.folder)
        if batch_idx + 1 == self.after + 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_run_resumes_bit_for_bit(name, load, tmp_path):
    whole = STAGES[name](load)
    metrics = fit(whole, tmp_path / "whole")
    killed = STAGES[name](load)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(killed, tmp_path / "killed", callbacks=[Stop(2, tmp_path / "killed")])
    (checkpoint,) = (tmp_path / "killed" / "checkpoints").glob("*.ckpt")
    resumed = STAGES[name](load)
    again = fit(resumed, tmp_path / "killed", resume=checkpoint)
    assert resumed.updates_done == whole.updates_done > 0
    assert same(weights(resumed), weights(whole))
    assert again == metrics
    rows, expected = read_rows(tmp_path / "killed" / "metrics.csv"), read_rows(tmp_path / "whole" / "metrics.csv")
    assert rows == expected


def test_ppo_starts_each_rollout_at_ratio_one(load, tmp_path):
    fit(ppo(load), tmp_path)
    rows = read_rows(tmp_path / "metrics.csv")
    assert len(rows) >= 4
    for row in rows[:4]:
        assert row["first_ratio"] == pytest.approx(1.0, abs=1e-6)
        assert row["first_approx_kl"] == pytest.approx(0.0, abs=1e-10)
    assert any(row["approx_kl"] > 1e-8 for row in rows)  # later minibatches do move


def test_ppo_starts_with_no_kl_to_the_reference(load, tmp_path):
    for lora in (False, True):
        fit(ppo(load, lora=lora), tmp_path / str(lora))
        assert read_rows(tmp_path / str(lora) / "metrics.csv")[0]["kl"] == pytest.approx(0.0, abs=1e-4)


def test_gamma_zero_equals_the_run_without_text_bit_for_bit(load, tmp_path):
    with_text, without = ppo(load, gamma=0.0), ppo(load, gamma=0.0, text=False)
    fit(with_text, tmp_path / "a")
    fit(without, tmp_path / "b")
    assert same(weights(with_text), weights(without))


def gradient(stage: Stage, folder: Path) -> torch.Tensor:
    """Return the gradient of the first update, unclipped, as one vector."""
    found: list[torch.Tensor] = []
    stage.gradient_clip = None
    stage._optimizer = Recording(found)
    fit(stage, folder, limit_train_batches=1)
    return found[0]


class Recording:
    """Optimizer that takes no step and keeps the gradients."""

    def __init__(self, found: list[torch.Tensor]) -> None:
        self.found = found

    def __call__(self, groups):
        optimizer = torch.optim.SGD(groups, lr=0.0)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.register_step_pre_hook(
            lambda *_: self.found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        )
        return optimizer


def test_the_gradient_is_linear_in_gamma(load, tmp_path):
    """J = PPO + gamma * pretraining, in one step: g(2) - g(0) = 2 (g(1) - g(0))."""
    at = {gamma: gradient(ppo(load, gamma=gamma), tmp_path / str(gamma)) for gamma in (0.0, 1.0, 2.0)}
    assert (at[1.0] - at[0.0]).norm() > 1e-3
    torch.testing.assert_close(at[2.0] - at[0.0], 2 * (at[1.0] - at[0.0]), atol=1e-5, rtol=1e-4)


def test_value_warmup_does_not_change_the_policy(load, tmp_path):
    stage = ppo(load, value_warmup=4)
    before = weights(stage)
    fit(stage, tmp_path)
    after = weights(stage)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("critic.") for name in moved)


def test_beta_adapts_only_once_the_policy_moves(load, tmp_path):
    """A policy that does not move is at a KL of 0, far below any target: beta would fall for no reason."""
    objective = PPO(kl_target=6.0, kl_horizon=50.0)
    stages = {warmup: ppo(load, objective=objective, value_warmup=warmup) for warmup in (4, 3)}
    for warmup, stage in stages.items():
        fit(stage, tmp_path / str(warmup))
    assert stages[4].beta == objective.beta > stages[3].beta


@pytest.mark.parametrize("lora", [False, True])
def test_only_trainable_weights_move(load, tmp_path, lora):
    stage = ppo(load, lora=lora)
    before = weights(stage)
    fit(stage, tmp_path)
    after = weights(stage)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    policy = {name for name in moved if name.startswith("policy.")}
    assert policy and (not lora or all(".lora_" in name for name in policy))


def test_ppo_refuses_a_sampler_that_truncates_the_distribution(load):
    for sampler in (
        AncestralSampler(top_k=5),
        AncestralSampler(top_p=0.9),
        AncestralSampler(samples=2),
        AncestralSampler(temperature=0),
    ):
        with pytest.raises(UserError, match="sampler"):
            PPOStage(load(), PPO(), data("prompt"), None, GoldReward(), sampler, *COMMON)


def test_ppo_stops_when_sampler_and_policy_disagree(load, tmp_path):
    """For example generation with dropout, with another temperature, or with stale weights."""
    stage = ppo(load)
    inner = stage.sampler.sample

    class Stale:
        temperature, samples, exact, longest, matches_policy = 1.0, 1, True, 10, True
        check, check_lengths, room = stage.sampler.check, stage.sampler.check_lengths, stage.sampler.room

        def sample(self, policy, prompts, seed):
            rollout = inner(policy, prompts, seed)
            return type(rollout)(**{**rollout.__dict__, "logp": rollout.logp - 0.1})

    stage.sampler = Stale()
    with pytest.raises(RunFailed, match="sampler"):
        fit(stage, tmp_path)


def test_dpo_starts_at_log_two(load, tmp_path):
    fit(dpo(load), tmp_path)
    first = read_rows(tmp_path / "metrics.csv")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_dpo_learns_the_preferences_of_its_pairs(load, tmp_path):
    stage = dpo(load, epochs=30)
    fit(stage, tmp_path)
    rows = read_rows(tmp_path / "metrics.csv")
    assert rows[-1]["loss"] < 0.4 and rows[-1]["accuracy"] > 0.85


def test_sft_memorises_four_dialogues(load, tmp_path):
    stage = SFTStage(load(), CrossEntropy(), data("demonstration", 4, 1), *COMMON, batch_size=4, epochs=150)
    stage._optimizer = lambda groups: torch.optim.AdamW(groups, lr=1e-2)
    fit(stage, tmp_path)
    assert read_rows(tmp_path / "metrics.csv")[-1]["loss"] < 0.05


def test_packing_does_not_change_the_loss(load, tmp_path):
    """Documents in one row do not attend to each other: the loss over all of them equals that of padded rows."""
    losses = {}
    for packing in (None, 96):
        torch.manual_seed(0)
        records = data("demonstration", 24, 1)
        stage = SFTStage(load(), CrossEntropy(), records, *COMMON, batch_size=4, epochs=1, packing=packing)
        stage._optimizer = lambda groups: torch.optim.SGD(groups, lr=0.0)
        stage.batch_size = 1
        fit(stage, tmp_path / str(packing))
        rows = [row for row in read_rows(tmp_path / str(packing) / "metrics.csv") if "loss" in row]
        tokens = [sum(example.mask[1:]) for example in stage.examples]
        losses[packing] = len(rows), sum(tokens)
        total = 0.0
        for example in stage.examples:
            part = stage.collate([example])
            logp, _ = stage.policy.logprobs(
                TokenBatch.of(part.ids, part.attention_mask, part.loss_mask, part.position_ids)
            )
            total += float(logp.sum())
        losses[packing] += (total,)
    assert losses[96][0] < losses[None][0]
    assert losses[96][1] == losses[None][1]
    assert losses[96][2] == pytest.approx(losses[None][2], rel=1e-5)


def test_the_reward_model_is_saved_with_its_normalisation(load, tmp_path):
    from rlhf.models.scalar import ScalarModel

    stage = reward_model(load, normalize="standard")
    fit(stage, tmp_path)
    stage.save(tmp_path / "model")
    loaded = ScalarModel.load(tmp_path / "model")
    parts = stage.parts(list(stage.examples))
    tokens = next(iter(parts)).tokens
    scores = loaded.scores(TokenBatch.of(tokens.ids, tokens.attention_mask, position_ids=tokens.position_ids))
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-4)
    assert scores.std().item() == pytest.approx(1.0, abs=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run(load, tmp_path):
    stage = sft(load)
    stage._optimizer = lambda groups: torch.optim.SGD(groups, lr=1e30)
    with pytest.raises(RunFailed, match="loss became"):
        fit(stage, tmp_path)
    assert (tmp_path / "failed_step.txt").exists()
