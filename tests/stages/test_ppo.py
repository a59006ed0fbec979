"""PPO in detail: the checklist of details that public implementations got wrong, one test each."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf.checkpoints import Checkpoints
from rlhf.errors import RunFailed, UserError
from rlhf.functional.masking import masked_mean, masked_var
from rlhf.metrics_file import read_rows
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.precision import Precision
from rlhf.models.scalar import ScalarModel
from rlhf.rollout import Rollout, Sampler
from rlhf.testing import tiny_model
from rlhf_ppo.objective import PPO
from rlhf_ppo.stage import PPOStage

from .conftest import adamw, constant, data, fit, same, weights
from .test_exactness import Stop

COMMON = (adamw, constant)


class Varied:
    """A reward of any scale that differs between replies, and sees whether they ended."""

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        return 10.0 + 4.0 * (rollout.response_ids * rollout.mask).float().sum(1).sin() + rollout.ended.float()


def varied(load, objective: PPO | None = None, sampler: Sampler | None = None, lora: bool = False, **knobs) -> PPOStage:
    """PPO with that reward, so that its scores are neither constant nor already normal."""
    knobs = {"batch_size": 8, "steps": 4, "epochs": 2, "minibatches": 2, "text_length": 32, **knobs}
    return PPOStage(
        load(lora), objective or PPO(), data("prompt"), data("text"), Varied(), sampler or Sampler(10), *COMMON, **knobs
    )


def rows_of(folder: Path) -> list[dict]:
    return [row for row in read_rows(folder / "metrics.csv") if "score" in row]


class Watched(PPOStage):
    """Keeps what it evaluates."""

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
    "knobs",
    [
        {"normalize_scores": "running", "missing_end": "replace", "average": 0.9},
        {"kl_target": 0.01, "kl_horizon": 50.0, "gamma": 0.5, "value_warmup": 1},
        {"normalize_scores": "running", "average": 0.5, "lora": True, "kl_target": 0.01, "kl_horizon": 50.0},
    ],
    ids=["running-average", "adaptive-gamma", "lora"],
)
def test_all_state_survives_a_kill(knobs, load, tmp_path):
    """Running moments, the adapted beta, the moving average: the same bits and the same metrics."""

    def make():
        own = {key: value for key, value in knobs.items() if key in PPO.__dataclass_fields__}
        return varied(load, PPO(**own), **{key: value for key, value in knobs.items() if key not in own})

    whole = make()
    expected = fit(whole, tmp_path / "whole")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(make(), tmp_path / "killed", callbacks=[Stop(2, tmp_path / "killed")])
    (checkpoint,) = (tmp_path / "killed" / "checkpoints").glob("*.ckpt")
    resumed = make()
    assert fit(resumed, tmp_path / "killed", resume=checkpoint) == expected
    assert same(weights(resumed), weights(whole))
    assert resumed.beta == whole.beta and resumed.score_moments == whole.score_moments
    with resumed.averaged(), whole.averaged():
        assert same(weights(resumed), weights(whole))
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    if "kl_target" in knobs:
        assert len({row["beta"] for row in rows_of(tmp_path / "whole")}) > 1


# -- scores ---------------------------------------------------------------------------------------------------------


def test_running_normalisation_is_over_all_rollouts_so_far(load, tmp_path):
    stage = watched(load, normalize_scores="running", score_clip=None, missing_end_penalty=0.0)
    fit(stage, tmp_path, limit_val_batches=0)
    raw = [Varied()(rollout) for rollout, *_ in stage.seen]
    for index, (_, scores, _) in enumerate(stage.seen):
        so_far = torch.cat(raw[: index + 1])
        torch.testing.assert_close(scores, (raw[index] - so_far.mean()) / so_far.std(), atol=1e-5, rtol=1e-5)
    assert rows_of(tmp_path)[0]["score"] == pytest.approx(raw[0].mean().item())  # what is logged is the reward's own


def test_batch_normalisation_is_over_the_rollout(load, tmp_path):
    stage = watched(load, normalize_scores="batch", score_clip=None, missing_end_penalty=0.0)
    fit(stage, tmp_path, limit_val_batches=0)
    for _, scores, _ in stage.seen:
        assert scores.mean().item() == pytest.approx(0, abs=1e-5) and scores.std().item() == pytest.approx(1, abs=1e-4)


def test_clipping_comes_before_the_missing_end(load):
    stage = varied(load, score_clip=5.0, missing_end_penalty=2.0)
    raw, ended = torch.tensor([9.0, 9.0, -9.0, 1.0]), torch.tensor([True, False, False, True])
    assert stage.learnt(raw, ended).tolist() == [5.0, 3.0, -7.0, 1.0]
    stage.missing_end = "replace"
    assert stage.learnt(raw, ended).tolist() == [5.0, -2.0, -2.0, 1.0]


# -- the KL budget --------------------------------------------------------------------------------------------------


def test_a_kl_budget_ends_the_training_and_keeps_the_result(load, tmp_path, capsys):
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
    assert stage.updates_done == stop * 4  # no update on the rollout that is over
    assert "val/score" in metrics and stage.final_metrics() == {"over_kl_budget": 1.0}
    stage.save(tmp_path / "model")
    CausalLM(str(tmp_path / "model"), None, None).load(NoAdapter(), Precision("32-true"))


def test_a_budget_that_is_not_spent_changes_nothing(load, tmp_path):
    with_budget, without = varied(load, kl_budget=1e6), varied(load)
    fit(with_budget, tmp_path / "a", limit_val_batches=0)
    fit(without, tmp_path / "b", limit_val_batches=0)
    assert same(weights(with_budget), weights(without))
    assert with_budget.final_metrics() == {"over_kl_budget": 0.0}


def test_no_checkpoint_of_a_run_that_ends_itself(load, tmp_path):
    """Killed between the end and the summary, it goes on from before and ends the same way."""
    stage = varied(load, steps=4, kl_budget=1e-9)
    every = Checkpoints(every_n_batches=1)
    fit(stage, tmp_path, callbacks=[every], enable_checkpointing=True, limit_val_batches=0)
    assert stage.over_budget
    saved = [int(path.stem.partition("=")[2]) for path in (tmp_path / "checkpoints").glob("*.ckpt")]
    assert saved == [len(rows_of(tmp_path)) - 1]


# -- the moving average ---------------------------------------------------------------------------------------------


def test_the_average_is_what_is_saved_and_validated(load, tmp_path):
    stage = varied(load, average=0.9)
    fit(stage, tmp_path / "run")
    stage.save(tmp_path / "model")
    saved = CausalLM(str(tmp_path / "model"), None, None).load(NoAdapter(), Precision("32-true"))
    assert stage.average is not None
    for name, value in saved.named_parameters():
        torch.testing.assert_close(value, stage.average.state[name], atol=0, rtol=0)
    assert not same(dict(saved.named_parameters()), dict(stage.policy.named_parameters()))


def test_training_does_not_see_the_average(load, tmp_path):
    averaged, plain = varied(load, average=0.9), varied(load)
    fit(averaged, tmp_path / "a", val_check_interval=1)
    fit(plain, tmp_path / "b", val_check_interval=1)
    assert same(weights(averaged), weights(plain))


# -- the checklist --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_temperature_divides_the_logits_of_sampler_policy_and_reference(lora, load, tmp_path):
    """At 0.7 the sampler's check passes, the first ratio is 1, and the first KL 0, so all three divide alike."""
    stage = watched(load, sampler=Sampler(10, temperature=0.7), lora=lora)
    fit(stage, tmp_path, limit_val_batches=0)
    rollout, _, experience = stage.seen[0]
    torch.testing.assert_close(experience.logp, experience.ref_logp, atol=1e-5, rtol=1e-5)
    stage = varied(load)
    plain = stage.reference.logprobs(*_inputs(rollout))[:, -rollout.mask.shape[1] :]
    assert ((plain - experience.ref_logp).abs() * rollout.mask).max() > 0.05
    assert rows_of(tmp_path)[0]["first_ratio"] == pytest.approx(1, abs=1e-6)


def _inputs(rollout: Rollout) -> tuple[torch.Tensor, ...]:
    return rollout.ids, rollout.attention_mask, rollout.position_ids, rollout.loss_mask


def test_experience_is_aligned_with_the_tokens(load, tmp_path):
    """logp_t is read from the logits at t-1, and V_t from the state before token t is chosen."""
    stage = watched(load, value_warmup=1)
    torch.nn.init.normal_(stage.critic.head.weight)
    fit(stage, tmp_path, limit_train_batches=1, limit_val_batches=0)
    rollout, _, experience = stage.seen[0]
    policy = load()
    for row in range(len(rollout.texts)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        reply = rollout.response_ids[row][rollout.mask[row]]
        ids = torch.cat([prompt, reply])[None]
        logits = policy.base(input_ids=ids).logits[0].log_softmax(-1)
        for t in range(len(reply)):
            expected = logits[len(prompt) + t - 1, reply[t]]
            assert experience.logp[row, t].item() == pytest.approx(expected.item(), abs=1e-4)
            assert rollout.logp[row, t].item() == pytest.approx(expected.item(), abs=1e-4)


def test_a_value_does_not_see_the_token_it_is_the_baseline_of(load, tmp_path):
    stage = varied(load)
    torch.nn.init.normal_(stage.critic.head.weight)
    rollout = stage.rollout.sample(stage.policy, stage.data.train[:4], 0)
    width = rollout.mask.shape[1]
    changed = rollout.response_ids.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 300
    before, after = (
        stage.critic.values(x.ids, x.attention_mask, x.position_ids)[:, -width - 1 : -1]
        for x in (rollout, replace(rollout, response_ids=changed))
    )
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3], after[:, 3])


def test_what_stands_after_the_end_changes_nothing(load, tmp_path):
    """Rubbish in place of padding: the same weights, the same metrics."""
    metrics, trained = [], []
    for rubbish in (False, True):
        stage = varied(load, PPO(entropy_coefficient=0.1))
        inner = stage.rollout.sample

        class Dirty(Sampler):
            def sample(self, policy, prompts, seed, inner=inner, rubbish=rubbish):
                rollout = inner(policy, prompts, seed)
                if not rubbish:
                    return rollout
                ids = torch.where(rollout.mask, rollout.response_ids, 7)
                return replace(rollout, response_ids=ids, logp=torch.where(rollout.mask, rollout.logp, -99.0))

        stage.rollout = Dirty(10)
        metrics.append(fit(stage, tmp_path / str(rubbish)))
        trained.append(weights(stage))
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, atol=1e-6, rtol=1e-5, msg=name)
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4, abs=1e-5)


def test_the_end_is_trained_and_padding_may_be_the_same_token(load):
    """The mask goes by position: with pad = end-of-turn the end still counts, and what follows does not."""
    policy = load()
    policy.pad_id = policy.end_id
    rollout = Sampler(24).sample(policy, data("prompt").train, 3)
    assert rollout.ended.any() and not rollout.mask.all()
    for row in range(len(rollout.texts)):
        ids, mask = rollout.response_ids[row], rollout.mask[row]
        ends = (ids == policy.end_id).nonzero()[:, 0]
        assert mask.sum() == (ends[0] + 1 if rollout.ended[row] else len(ids))
    assert torch.equal(rollout.loss_mask[:, -rollout.mask.shape[1] :], rollout.mask)


def test_the_score_comes_with_the_last_token_and_the_kl_is_not_differentiated(load, tmp_path):
    stage = watched(load, objective=PPO(discount=1.0, gae_lambda=1.0, beta=0.3))
    fit(stage, tmp_path, limit_val_batches=0)
    for rollout, scores, x in stage.seen:
        for tensor in (x.logp, x.ref_logp, x.values, x.advantages, x.returns):
            assert not tensor.requires_grad and tensor.dtype == torch.float32
        last = rollout.mask.sum(1) - 1
        final = x.returns.gather(1, last[:, None])[:, 0]
        gap = (x.logp - x.ref_logp).gather(1, last[:, None])[:, 0]
        torch.testing.assert_close(final, scores - 0.3 * gap, atol=1e-4, rtol=1e-4)
        # with lambda = discount = 1 the first return is the score less all of the KL
        total = scores - 0.3 * ((x.logp - x.ref_logp) * rollout.mask).sum(1)
        torch.testing.assert_close(x.returns[:, 0], total, atol=1e-4, rtol=1e-4)


def test_advantages_are_whitened_over_the_whole_rollout(load, tmp_path):
    stage = watched(load)
    fit(stage, tmp_path, limit_val_batches=0)
    for _, _, x in stage.seen:
        assert masked_mean(x.advantages, x.mask).item() == pytest.approx(0, abs=1e-6)
        assert masked_var(x.advantages, x.mask).item() == pytest.approx(1, abs=1e-4)
        assert x.advantages[~x.mask].eq(0).all()


def test_dropout_is_off_in_every_model(folder, tmp_path):
    """A model whose configuration asks for dropout: the sampler's check and the ratio's would stop the run."""
    torch.manual_seed(1)

    def load(lora=False):
        model = CausalLM(str(folder), None, None).load(NoAdapter(), Precision("32-true"))
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
        return model

    stage = varied(load)
    fit(stage, tmp_path, limit_val_batches=0)
    rows = rows_of(tmp_path)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4) and rows[0]["first_ratio"] == pytest.approx(1, abs=1e-6)


def test_the_critic_starts_from_the_reward_model(load, tmp_path):
    """Read at the last token it says the score, normalisation included; the zero head says 0 everywhere."""
    torch.manual_seed(3)
    scorer = ScalarModel.load(load())
    scorer.scale.fill_(2.0)
    scorer.bias.fill_(0.5)
    scorer.save(tmp_path / "reward")
    stage = varied(load, value=str(tmp_path / "reward"))
    rollout = stage.rollout.sample(stage.policy, stage.data.train[:4], 0)
    inputs = (rollout.ids, rollout.attention_mask, rollout.position_ids)
    last = (rollout.attention_mask * torch.arange(rollout.ids.shape[1])).argmax(1, keepdim=True)
    torch.testing.assert_close(stage.critic.values(*inputs).gather(1, last)[:, 0], scorer.scores(*inputs))
    fresh = varied(load).critic.values(*inputs)
    assert fresh.eq(0).all()


def test_the_learning_rate_moves_once_a_rollout(load, tmp_path):
    seen = []

    def linear(step: int, total: int) -> float:
        seen.append((step, total))
        return 1 - step / total

    stage = varied(load)
    stage._scheduler = linear
    fit(stage, tmp_path, limit_val_batches=0)
    assert seen == [(rollout, 4) for rollout in range(4) for _ in range(4)]


def test_the_adaptive_beta_steers_and_is_used(load, tmp_path):
    """Far above its target the KL raises beta by a fifth of n / horizon, and the next rollout is rewarded with it."""
    stage = watched(load, objective=PPO(beta=0.1, kl_target=1e-4, kl_horizon=40.0))
    stage._optimizer = lambda groups: torch.optim.AdamW(groups, lr=1e-2)
    fit(stage, tmp_path, limit_val_batches=0)
    rows = rows_of(tmp_path)
    for before, after in zip(rows[:-1], rows[1:], strict=True):
        error = min(max(before["kl"] / 1e-4 - 1, -0.2), 0.2)
        assert after["beta"] == pytest.approx(before["beta"] * (1 + error * 8 / 40), rel=1e-5)
    rollout, scores, x = stage.seen[-1]
    last = rollout.mask.sum(1, keepdim=True) - 1
    gap = (x.logp - x.ref_logp).gather(1, last)[:, 0]
    torch.testing.assert_close(x.returns.gather(1, last)[:, 0], scores - rows[-1]["beta"] * gap, atol=1e-4, rtol=1e-4)


def test_half_precision_is_checked_too(load, tmp_path):
    class Foreign(Sampler):
        def sample(self, policy, prompts, seed):
            rollout = super().sample(policy, prompts, seed)
            return replace(rollout, logp=rollout.logp - 0.5 * rollout.mask)

    fit(varied(load), tmp_path / "a", precision="bf16-mixed", limit_val_batches=0)
    with pytest.raises(RunFailed, match="sampler"):
        fit(varied(load, sampler=Foreign(10)), tmp_path / "b", precision="bf16-mixed", limit_val_batches=0)


def test_nan_does_not_pass_the_check(load, tmp_path):
    class Broken(Sampler):
        def sample(self, policy, prompts, seed):
            rollout = super().sample(policy, prompts, seed)
            return replace(rollout, logp=rollout.logp * float("nan"))

    with pytest.raises(RunFailed, match="sampler"):
        fit(varied(load, sampler=Broken(10)), tmp_path, limit_val_batches=0)


# -- inputs that do not fit -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """A model with a vocabulary of its own."""
    path = tmp_path_factory.mktemp("foreign") / "model"
    tiny_model().save(path)
    return path


def test_a_reference_with_another_vocabulary_is_refused(load, foreign):
    with pytest.raises(UserError, match=r"inputs\.reference=.* another vocabulary .* type inputs\.reference=null"):
        varied(load, reference=str(foreign))


def test_a_reference_that_is_no_language_model_is_named(load, tmp_path):
    ScalarModel.load(load()).save(tmp_path / "reward")
    with pytest.raises(UserError, match=r"^inputs\.reference=.*reward: is a reward or value model"):
        varied(load, reference=str(tmp_path / "reward"))


def test_a_critic_with_another_vocabulary_is_refused(load, foreign, tmp_path):
    with pytest.raises(UserError, match=r"stage\.value=.* another vocabulary .* type stage\.value=null"):
        varied(load, value=str(foreign))


def test_a_reference_of_its_own_is_where_kl_is_measured_from(load, folder, tmp_path):
    other = load()
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    other.save(tmp_path / "other")
    for lora in (False, True):
        stage = varied(load, reference=str(tmp_path / "other"), lora=lora)
        fit(stage, tmp_path / str(lora), limit_val_batches=0)
        assert abs(rows_of(tmp_path / str(lora))[0]["kl"]) > 1e-2
    fit(varied(load, reference=str(folder)), tmp_path / "same", limit_val_batches=0)
    fit(varied(load), tmp_path / "none", limit_val_batches=0)
    assert rows_of(tmp_path / "same") == rows_of(tmp_path / "none")


def test_a_prompt_that_leaves_no_room_is_refused_before_training(load, tmp_path):
    with pytest.raises(UserError, match=r"prompt '.*' has \d+ tokens"):
        fit(varied(load, sampler=Sampler(120)), tmp_path)
    assert not (tmp_path / "metrics.csv").exists() or not rows_of(tmp_path)


def test_minibatches_must_divide_the_batch(load):
    with pytest.raises(UserError, match="stage.batch_size=9"):
        varied(load, batch_size=8, minibatches=3)


# -- several processes ----------------------------------------------------------------------------------------------


class OnBoth(Watched):
    """Writes down, on every process, what it evaluated."""

    def on_train_end(self):
        _, scores, x = self.seen[0]
        torch.save(
            {"scores": scores, "advantages": x.advantages, "mask": x.mask, "moments": self.score_moments},
            self.run_folder / f"rank{self.trainer.global_rank}.pt",
        )


def test_whitening_and_moments_are_over_both_processes(load, tmp_path):
    stage = varied(load, normalize_scores="running", steps=1, score_clip=None, missing_end_penalty=0.0)
    stage.__class__ = OnBoth
    fit(stage, tmp_path, devices=2, strategy="ddp_fork", limit_val_batches=0)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert first["moments"] == second["moments"] and first["moments"][0] == 8
    scores = torch.cat([first["scores"], second["scores"]])
    assert scores.mean().item() == pytest.approx(0, abs=1e-4) and scores.std().item() == pytest.approx(1, abs=1e-3)
    assert abs(first["scores"].mean().item()) > 1e-3  # each half alone is not normal
    kept = torch.cat([part["advantages"][part["mask"]] for part in (first, second)])
    assert kept.mean().item() == pytest.approx(0, abs=1e-5) and kept.std().item() == pytest.approx(1, abs=1e-3)
    assert abs(masked_mean(first["advantages"], first["mask"]).item()) > 1e-3
