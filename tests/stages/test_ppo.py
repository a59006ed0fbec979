"""PPO: resuming, shaping of scores, the KL budget and the EMA."""

import math
from pathlib import Path

import pytest
import torch

from rlhf.callbacks.checkpoints import Checkpoints
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.precision import Precision
from rlhf.reward.base import Reward
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.rollout import Rollout
from rlhf.storage.metrics_file import read_rows
from rlhf_ppo.objective import PPO
from rlhf_ppo.stage import PPOStage

from .conftest import adamw, constant, data, fit, same, weights
from .test_exactness import Stop

COMMON = (adamw, constant)


class Varied(Reward):
    """Reward of any scale that differs between responses and depends on whether they ended."""

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        return 10.0 + 4.0 * (rollout.response_ids * rollout.mask).float().sum(1).sin() + rollout.ended.float()


def varied(
    load, objective: PPO | None = None, sampler: AncestralSampler | None = None, lora: bool = False, **hyperparameters
) -> PPOStage:
    """Build PPO with that reward, so that its scores are neither constant nor already normal."""
    hyperparameters = {"batch_size": 8, "steps": 4, "epochs": 2, "minibatches": 2, "text_length": 32, **hyperparameters}
    return PPOStage(
        load(lora),
        objective or PPO(),
        data("prompt"),
        data("text"),
        Varied(),
        sampler or AncestralSampler(10),
        *COMMON,
        **hyperparameters,
    )


def rows_of(folder: Path) -> list[dict]:
    return [row for row in read_rows(folder / "metrics.csv") if "score" in row]


class Watched(PPOStage):
    """PPO that keeps its evaluated rollouts."""

    def evaluate(self, rollout, scores):
        experience = super().evaluate(rollout, scores)
        self.seen = [*getattr(self, "seen", []), (rollout, scores, experience)]
        return experience


def watched(load, **arguments) -> Watched:
    stage = varied(load, **arguments)
    stage.__class__ = Watched
    return stage


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hyperparameters",
    [
        {"normalize_scores": "running", "missing_eos": "replace", "ema_decay": 0.9},
        {"kl_target": 0.01, "kl_horizon": 50.0, "gamma": 0.5, "value_warmup": 1},
        {"normalize_scores": "running", "ema_decay": 0.5, "lora": True, "kl_target": 0.01, "kl_horizon": 50.0},
    ],
    ids=["running-average", "adaptive-gamma", "lora"],
)
def test_all_state_is_restored_after_a_kill(hyperparameters, load, tmp_path):
    """Running moments, the adapted beta, the EMA: the same bits and the same metrics."""

    def make():
        own = {key: value for key, value in hyperparameters.items() if key in PPO.__dataclass_fields__}
        return varied(load, PPO(**own), **{key: value for key, value in hyperparameters.items() if key not in own})

    whole = make()
    expected = fit(whole, tmp_path / "whole")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(make(), tmp_path / "killed", callbacks=[Stop(2, tmp_path / "killed")])
    (checkpoint,) = (tmp_path / "killed" / "checkpoints").glob("*.ckpt")
    resumed = make()
    assert fit(resumed, tmp_path / "killed", resume=checkpoint) == expected
    assert same(weights(resumed), weights(whole))
    assert resumed.beta == whole.beta and resumed.score_moments == whole.score_moments
    with resumed.ema_weights(), whole.ema_weights():
        assert same(weights(resumed), weights(whole))
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    if "kl_target" in hyperparameters:
        assert len({row["beta"] for row in rows_of(tmp_path / "whole")}) > 1


# -- scores ---------------------------------------------------------------------------------------------------------


def test_running_normalisation_covers_all_rollouts_so_far(load, tmp_path):
    stage = watched(load, normalize_scores="running", score_clip=None, missing_eos_penalty=0.0)
    fit(stage, tmp_path, limit_val_batches=0)
    raw = [Varied()(rollout) for rollout, *_ in stage.seen]
    for index, (_, scores, _) in enumerate(stage.seen):
        so_far = torch.cat(raw[: index + 1])
        torch.testing.assert_close(scores, (raw[index] - so_far.mean()) / so_far.std(), atol=1e-5, rtol=1e-5)
    assert rows_of(tmp_path)[0]["score"] == pytest.approx(raw[0].mean().item())  # the logged score is the reward's own


def test_batch_normalisation_covers_the_rollout(load, tmp_path):
    stage = watched(load, normalize_scores="batch", score_clip=None, missing_eos_penalty=0.0)
    fit(stage, tmp_path, limit_val_batches=0)
    for _, scores, _ in stage.seen:
        assert scores.mean().item() == pytest.approx(0, abs=1e-5) and scores.std().item() == pytest.approx(1, abs=1e-4)


def test_scores_are_clipped_before_the_missing_eos_penalty(load):
    stage = varied(load, score_clip=5.0, missing_eos="subtract", missing_eos_penalty=2.0)
    raw, ended = torch.tensor([9.0, 9.0, -9.0, 1.0]), torch.tensor([True, False, False, True])
    assert stage.shape_scores(raw, ended).tolist() == [5.0, 3.0, -7.0, 1.0]
    stage.missing_eos = "replace"
    assert stage.shape_scores(raw, ended).tolist() == [5.0, -2.0, -2.0, 1.0]


# -- the KL budget --------------------------------------------------------------------------------------------------


def test_a_spent_kl_budget_ends_training_and_keeps_the_policy(load, tmp_path, capsys):
    free = varied(load, steps=4)
    fit(free, tmp_path / "free", limit_val_batches=0)
    kls = [row["kl"] for row in rows_of(tmp_path / "free")]
    budget = max(kls[1] / 2, 1e-6)
    stop = next(index for index, kl in enumerate(kls) if kl > budget)
    stage = varied(load, steps=4, kl_budget=budget)
    metrics = fit(stage, tmp_path / "held")
    assert "kl_budget" in capsys.readouterr().out
    rows = [row for row in rows_of(tmp_path / "held")]
    assert len(rows) == stop + 1 and rows[-1]["kl"] > budget
    assert stage.updates_done == stop * 4  # no update on the rollout beyond the budget
    assert "val/score" in metrics and stage.final_metrics() == {"over_kl_budget": 1.0}
    stage.save(tmp_path / "model")
    CausalLM(str(tmp_path / "model"), None, None).load(NoAdapter(), Precision("32-true"))


def test_an_unspent_kl_budget_changes_nothing(load, tmp_path):
    with_budget, without = varied(load, kl_budget=1e6), varied(load)
    fit(with_budget, tmp_path / "a", limit_val_batches=0)
    fit(without, tmp_path / "b", limit_val_batches=0)
    assert same(weights(with_budget), weights(without))
    assert with_budget.final_metrics() == {"over_kl_budget": 0.0}


def test_a_run_that_spends_its_kl_budget_saves_no_final_checkpoint(load, tmp_path):
    """A run killed between the end and the summary resumes from an earlier checkpoint and ends equally."""
    stage = varied(load, steps=4, kl_budget=1e-4)  # above the rounding of two computations
    every = Checkpoints(every_n_batches=1)
    fit(stage, tmp_path, callbacks=[every], enable_checkpointing=True, limit_val_batches=0)
    assert stage.over_budget
    saved = [int(path.stem.partition("=")[2]) for path in (tmp_path / "checkpoints").glob("*.ckpt")]
    assert saved == [len(rows_of(tmp_path)) - 1]


# -- the EMA --------------------------------------------------------------------------------------------------------


def test_the_ema_is_saved_and_validated(load, tmp_path):
    stage = varied(load, ema_decay=0.9)
    fit(stage, tmp_path / "run")
    stage.save(tmp_path / "model")
    saved = CausalLM(str(tmp_path / "model"), None, None).load(NoAdapter(), Precision("32-true"))
    assert stage.ema is not None
    for name, value in saved.named_parameters():
        torch.testing.assert_close(value, stage.ema.state[name], atol=0, rtol=0)
    assert not same(dict(saved.named_parameters()), dict(stage.policy.named_parameters()))


def test_the_ema_does_not_affect_training(load, tmp_path):
    averaged, plain = varied(load, ema_decay=0.9), varied(load)
    fit(averaged, tmp_path / "a", val_check_interval=1)
    fit(plain, tmp_path / "b", val_check_interval=1)
    assert same(weights(averaged), weights(plain))


# -- the optimum ----------------------------------------------------------------------------------------------------


class Even(Reward):
    """1 for a response whose first token has an even id, 0 otherwise."""

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        return (rollout.response_ids[:, 0] % 2 == 0).float()


def even_probability(stage: PPOStage) -> float:
    """Mean probability, over the training prompts, that the first token of a response is even."""
    rollout = AncestralSampler(1).sample(stage.policy, list(stage.data.train), 0)
    tokens, width = rollout.tokens, rollout.prompt_ids.shape[1]
    with torch.no_grad():
        hidden = stage.policy.hidden(tokens)[:, width - 1]
        return stage.policy.head(hidden).float().softmax(-1)[:, ::2].sum(-1).mean().item()


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_ppo_finds_the_optimum_of_reward_minus_beta_kl(beta, load, tmp_path):
    """On responses of one token, max E[R] - beta KL is reached by pi proportional to pi_ref exp(R / beta)."""
    stage = PPOStage(
        load(),
        PPO(beta=beta, gamma=0.0),
        data("prompt", 64),
        None,
        Even(),
        AncestralSampler(1),
        lambda parameters: torch.optim.Adam(parameters, lr=6e-3),
        constant,
        batch_size=64,
        steps=30,
        epochs=2,
        minibatches=2,
    )
    before = even_probability(stage)
    optimum = before * math.exp(1 / beta) / (before * math.exp(1 / beta) + 1 - before)
    fit(stage, tmp_path, limit_val_batches=0)
    assert even_probability(stage) == pytest.approx(optimum, abs=0.04)
    assert optimum - before > 0.15
