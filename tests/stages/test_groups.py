"""GRPO and RLOO as stages: exact under micro-batches and kills, groups kept together, no update without spread."""

from collections.abc import Callable

import pytest
import torch

from rlhf.data.collate import TokenBatch
from rlhf.errors import RunFailed, UserError
from rlhf.reward.base import Reward
from rlhf.reward.gold import GoldReward
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.tool_calls import Calculator, ToolSampler
from rlhf.stage.base import Stage
from rlhf.storage.metrics_file import read_rows
from rlhf_grpo.objective import DAPO, GRPO, DrGRPO
from rlhf_grpo.stage import GRPOStage
from rlhf_rloo.objective import RLOO
from rlhf_rloo.stage import RLOOStage

from .conftest import adamw, constant, data, fit, same, weights
from .test_exactness import Stop, check_micro_batches, gradient


class Length(Reward):
    """Reward that differs between responses: their number of words and of letters."""

    def __call__(self, rollout):
        return torch.tensor([0.1 * len(text) + len(text.split()) for text in rollout.texts])


def make(
    kind, load, objective, samples=4, sampler=None, text=True, lora=False, reward=None, **hyperparameters
) -> Stage:
    hyperparameters = {"batch_size": 4, "steps": 3, "epochs": 2, "minibatches": 2, "text_length": 32, **hyperparameters}
    return kind(
        load(lora),
        objective,
        data("prompt"),
        data("text") if text else None,
        reward or Length(),
        sampler or AncestralSampler(10, samples=samples),
        adamw,
        constant,
        **hyperparameters,
    )


def grpo(load, objective=None, **hyperparameters) -> Stage:
    return make(GRPOStage, load, objective or GRPO(), **hyperparameters)


def rloo(load, objective=None, **hyperparameters) -> Stage:
    return make(RLOOStage, load, objective or RLOO(), **hyperparameters)


STAGES: dict[str, Callable[..., Stage]] = {
    "grpo": grpo,
    "dr_grpo": lambda load, **hyperparameters: grpo(load, DrGRPO(), **hyperparameters),
    "dapo": lambda load, **hyperparameters: grpo(load, DAPO(beta=0.1), **hyperparameters),
    "rloo": rloo,
}


@pytest.mark.parametrize("name", STAGES)
def test_micro_batches_do_not_change_the_weights(name, load, tmp_path):
    """1 x 8, 2 x 4 and 8 x 1, for every normalisation of the loss."""
    check_micro_batches(STAGES[name], load, tmp_path)


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
    assert resumed.updates_done == whole.updates_done == resumed.total_updates
    assert same(weights(resumed), weights(whole))
    assert again == metrics
    assert read_rows(tmp_path / "killed" / "metrics.csv") == read_rows(tmp_path / "whole" / "metrics.csv")


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("lora", [False, True])
def test_a_run_starts_at_ratio_one_and_zero_kl(name, lora, load, tmp_path):
    fit(STAGES[name](load, lora=lora), tmp_path)
    rows = [row for row in read_rows(tmp_path / "metrics.csv") if "first_ratio" in row]
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    for row in rows:
        assert row["first_ratio"] == pytest.approx(1.0, abs=1e-6)
        assert row["first_approx_kl"] == pytest.approx(0.0, abs=1e-10)
    assert any(row["approx_kl"] > 1e-8 for row in rows)


def test_the_first_gradient_equals_the_formula(load, tmp_path):
    """Recomputed from the rollout: mean over responses of mean over tokens of -A grad log pi, + beta grad k3 (0)."""
    stage = grpo(load, epochs=1, minibatches=1)
    found = gradient(stage, tmp_path)
    fresh = grpo(load)
    prompts = [stage.examples[i] for i in next(iter(stage.batches))]
    seeds: list[int] = []
    inner = fresh.sampler.sample
    again = grpo(load, epochs=1, minibatches=1)
    again.sampler.sample = lambda policy, batch, seed: seeds.append(seed) or inner(policy, batch, seed)  # type: ignore[method-assign]
    fit(again, tmp_path / "again", limit_train_batches=1, limit_val_batches=0)
    rollout = inner(fresh.policy, prompts, seeds[0])
    scores = Length()(rollout).view(-1, 4)
    advantages = ((scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)).view(-1)
    logp, _ = fresh.policy.logprobs(rollout.tokens)
    logp = logp[:, -rollout.mask.shape[1] :]
    loss = -(advantages.unsqueeze(1) * logp * rollout.mask / rollout.mask.sum(1, keepdim=True)).sum(1).mean()
    loss.backward()
    order = [p for group in stage.trainer.optimizers[0].param_groups for p in group["params"]]
    names = {id(p): name for name, p in stage.policy.named_parameters()}
    mine = dict(fresh.policy.named_parameters())
    expected = torch.cat([mine[names[id(p)]].grad.flatten() for p in order])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_scores_rise_during_training(load, tmp_path):
    """A reward for long responses increases their length."""
    for name, stage in {"grpo": grpo(load, steps=25, epochs=1), "rloo": rloo(load, steps=25, epochs=1)}.items():
        fit(stage, tmp_path / name)
        scores = [row["score"] for row in read_rows(tmp_path / name / "metrics.csv") if "score" in row]
        assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.3, name


class Equal(Reward):
    """Reward with the same score for every response."""

    def __call__(self, rollout):
        return torch.ones(len(rollout.texts))


def test_groups_without_spread_do_not_change_the_policy(load, tmp_path):
    """No step is made: neither remaining momentum nor weight decay moves the weights."""
    stage = grpo(load, DAPO(), reward=Equal())
    stage._optimizer = lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.5)
    before = weights(stage)
    fit(stage, tmp_path)
    assert same(before, weights(stage))
    row = read_rows(tmp_path / "metrics.csv")[0]
    assert row["zero_spread"] == row["dropped"] == 1.0 and row["loss"] == 0.0


class Half(Reward):
    """Reward that differs within the first group alone."""

    def __call__(self, rollout):
        return torch.tensor([1.0, 0.0] + [0.5] * (len(rollout.texts) - 2))


def test_dropped_groups_are_counted_and_not_trained_on(load, tmp_path):
    """The update of a rollout with dropped groups is that of the other groups alone."""
    stage = grpo(load, DAPO(), reward=Half(), epochs=1, minibatches=1)
    fit(stage, tmp_path, limit_train_batches=1)
    row = read_rows(tmp_path / "metrics.csv")[0]
    assert row["zero_spread"] == row["dropped"] == pytest.approx(0.75)
    assert stage.examples_seen == 4  # of 16


class Picky(Reward):
    """Reward with spread in the groups of every third prompt alone."""

    def __call__(self, rollout):
        return torch.tensor(
            [
                float(i % 2) if sum(prompt.messages[-1].content.encode()) % 3 == 0 else 0.5
                for i, prompt in enumerate(rollout.prompts)
            ]
        )


def test_dynamic_sampling_replaces_groups_without_spread(load, tmp_path):
    """DAPO's dynamic sampling: the batch is full of groups with spread, and the run is the same after a kill."""

    def resampling() -> Stage:
        return grpo(load, DAPO(), reward=Picky(), max_resamples=10, batch_size=4)

    whole = resampling()
    seen: list = []
    inner = whole.rollout_logprobs
    whole.rollout_logprobs = lambda rollout: seen.append(rollout) or inner(rollout)  # type: ignore[method-assign]
    fit(whole, tmp_path / "whole")
    rows = read_rows(tmp_path / "whole" / "metrics.csv")
    assert {row["zero_spread"] for row in rows if "zero_spread" in row} == {0.0}
    assert any(row["drawn_zero_spread"] > 0 for row in rows if "drawn_zero_spread" in row)
    for rollout in seen:
        assert len(rollout.texts) == 16 and len(set(rollout.prompts)) == 4
        assert all(len(set(rollout.prompts[i : i + 4])) == 1 for i in range(0, 16, 4))
        start, tokens = rollout.prompt_mask.shape[1] - rollout.prompt_mask[0].sum(), rollout.tokens
        alone = load().logprobs(
            TokenBatch.of(*(x[:1, start:] for x in (tokens.ids, tokens.attention_mask, tokens.loss_mask)))
        )
        if rollout is seen[0]:
            torch.testing.assert_close(
                alone[0][0][alone[0][0] != 0], rollout.logp[0][rollout.mask[0]], atol=1e-4, rtol=0
            )
    killed = resampling()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(killed, tmp_path / "killed", callbacks=[Stop(2, tmp_path / "killed")])
    (checkpoint,) = (tmp_path / "killed" / "checkpoints").glob("*.ckpt")
    resumed = resampling()
    fit(resumed, tmp_path / "killed", resume=checkpoint)
    assert same(weights(resumed), weights(whole))


def test_dynamic_sampling_stops_when_no_prompt_has_spread(load, tmp_path):
    """Every prompt is used once at most, and groups that cannot be replaced stay."""
    stage = rloo(load, reward=Equal(), max_resamples=50, steps=1)
    fit(stage, tmp_path, limit_val_batches=0)
    row = read_rows(tmp_path / "metrics.csv")[0]
    assert row["zero_spread"] == row["drawn_zero_spread"] == 1.0
    assert row["resampled"] == (len({*stage.examples}) - 4) / 4  # all the others


def test_dynamic_sampling_changes_nothing_when_all_groups_have_spread(load, tmp_path):
    plain, other = grpo(load, DAPO()), grpo(load, DAPO(), max_resamples=5)
    fit(plain, tmp_path / "a", limit_val_batches=0)
    fit(other, tmp_path / "b", limit_val_batches=0)
    assert same(weights(plain), weights(other))
    assert {row["resampled"] for row in read_rows(tmp_path / "b" / "metrics.csv") if "resampled" in row} == {0.0}


def test_the_gradient_is_linear_in_gamma(load, tmp_path):
    for kind, objective in ((GRPOStage, GRPO), (RLOOStage, RLOO)):
        at = {
            gamma: gradient(make(kind, load, objective(gamma=gamma)), tmp_path / f"{kind.__name__}{gamma}")
            for gamma in (0.0, 1.0, 2.0)
        }
        assert (at[1.0] - at[0.0]).norm() > 1e-3
        torch.testing.assert_close(at[2.0] - at[0.0], 2 * (at[1.0] - at[0.0]), atol=1e-5, rtol=1e-4)


def test_invalid_settings_are_refused(load, tmp_path):
    with pytest.raises(UserError, match="sampler.samples=1.*type sampler.samples=8"):
        grpo(load, samples=1)
    for sampler in (
        AncestralSampler(samples=4, top_k=5),
        AncestralSampler(samples=4, top_p=0.9),
        AncestralSampler(samples=4, temperature=0),
    ):
        with pytest.raises(UserError, match="sampler.top_k=0"):
            rloo(load, sampler=sampler)
    with pytest.raises(UserError, match="type stage.batch_size=6"):
        grpo(load, batch_size=4, minibatches=3)
    with pytest.raises(UserError, match="objective.gamma"):
        fit(grpo(load, GRPO(gamma=1.0), text=False), tmp_path)


def test_the_run_stops_when_sampler_and_policy_disagree(load, tmp_path):
    stage = grpo(load, reward=GoldReward())
    inner = stage.sampler.sample

    def stale(policy, prompts, seed):
        rollout = inner(policy, prompts, seed)
        return type(rollout)(**{**rollout.__dict__, "logp": rollout.logp - 0.1})

    stage.sampler.sample = stale  # type: ignore[method-assign]
    with pytest.raises(RunFailed, match="sampler"):
        fit(stage, tmp_path)


@pytest.mark.parametrize("kind, name", [("rlhf_grpo", "grpo"), ("rlhf_rloo", "rloo")])
def test_every_metric_is_in_the_readme(kind, name, load, tmp_path):
    from tests.conf.test_docs import unexplained

    objective = GRPO(gamma=1.0) if name == "grpo" else RLOO(gamma=1.0)
    sampler = ToolSampler({"calculator": Calculator()}, max_new_tokens=6, samples=4)
    stage = STAGES[name](load, objective=objective, sampler=sampler, max_resamples=1)
    metrics = fit(stage, tmp_path, limit_train_batches=1, limit_val_batches=1)
    assert {"val/score", "resampled", "calls", "zero_spread", "pretraining_loss"} <= set(metrics)
    assert unexplained(kind, {*metrics, *stage.final_metrics()}) == set()
