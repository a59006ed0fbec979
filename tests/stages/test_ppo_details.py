"""Checklist of PPO details that public implementations got wrong, one test each."""

from dataclasses import replace

import pytest
import torch

from rlhf.errors import RunFailed
from rlhf.functional.masking import masked_mean, masked_var
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.precision import Precision
from rlhf.sampler.ancestral import AncestralSampler
from rlhf_ppo.objective import PPO

from .conftest import data, fit, weights
from .test_ppo import rows_of, varied, watched


@pytest.mark.parametrize("lora", [False, True])
def test_temperature_divides_the_logits_of_sampler_policy_and_reference(lora, load, tmp_path):
    """At 0.7 the sampler check passes, the first ratio is 1, and the first KL 0, so all three divide alike."""
    stage = watched(load, sampler=AncestralSampler(10, temperature=0.7), lora=lora)
    fit(stage, tmp_path, limit_val_batches=0)
    rollout, _, experience = stage.seen[0]
    torch.testing.assert_close(experience.logp, experience.ref_logp, atol=1e-5, rtol=1e-5)
    stage = varied(load)
    plain = stage.reference.logprobs(rollout.tokens)[:, -rollout.mask.shape[1] :]
    assert ((plain - experience.ref_logp).abs() * rollout.mask).max() > 0.05
    assert rows_of(tmp_path)[0]["first_ratio"] == pytest.approx(1, abs=1e-6)


def test_experience_is_aligned_with_its_tokens(load, tmp_path):
    """logp_t is read from the logits at t-1, and V_t from the state before token t is chosen."""
    stage = watched(load, value_warmup=1)
    torch.nn.init.normal_(stage.critic.head.weight)
    fit(stage, tmp_path, limit_train_batches=1, limit_val_batches=0)
    rollout, _, experience = stage.seen[0]
    policy = load()
    for row in range(len(rollout.texts)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        response = rollout.response_ids[row][rollout.mask[row]]
        ids = torch.cat([prompt, response])[None]
        logits = policy.base(input_ids=ids).logits[0].log_softmax(-1)
        for t in range(len(response)):
            expected = logits[len(prompt) + t - 1, response[t]]
            assert experience.logp[row, t].item() == pytest.approx(expected.item(), abs=1e-4)
            assert rollout.logp[row, t].item() == pytest.approx(expected.item(), abs=1e-4)


def test_a_value_does_not_depend_on_the_token_it_is_the_baseline_of(load, tmp_path):
    stage = varied(load)
    torch.nn.init.normal_(stage.critic.head.weight)
    rollout = stage.sampler.sample(stage.policy, stage.data.train[:4], 0)
    width = rollout.mask.shape[1]
    changed = rollout.response_ids.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 300
    before, after = (
        stage.critic.values(x.tokens)[:, -width - 1 : -1] for x in (rollout, replace(rollout, response_ids=changed))
    )
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3], after[:, 3])


def test_tokens_after_the_end_change_nothing(load, tmp_path):
    """Random tokens in place of padding give the same weights and the same metrics."""
    metrics, trained = [], []
    for rubbish in (False, True):
        stage = varied(load, PPO(entropy_coefficient=0.1))
        inner = stage.sampler.sample

        class Dirty(AncestralSampler):
            def sample(self, policy, prompts, seed, inner=inner, rubbish=rubbish):
                rollout = inner(policy, prompts, seed)
                if not rubbish:
                    return rollout
                ids = torch.where(rollout.mask, rollout.response_ids, 7)
                return replace(rollout, response_ids=ids, logp=torch.where(rollout.mask, rollout.logp, -99.0))

        stage.sampler = Dirty(10)
        metrics.append(fit(stage, tmp_path / str(rubbish)))
        trained.append(weights(stage))
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, atol=1e-6, rtol=1e-5, msg=name)
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4, abs=1e-5)


def test_the_end_is_trained_even_if_padding_is_the_same_token(load):
    """The mask is computed by position: with pad = end-of-turn the end is trained, and later tokens are not."""
    policy = load()
    policy.pad_id = policy.end_id
    rollout = AncestralSampler(24).sample(policy, data("prompt").train, 3)
    assert rollout.ended.any() and not rollout.mask.all()
    for row in range(len(rollout.texts)):
        ids, mask = rollout.response_ids[row], rollout.mask[row]
        ends = (ids == policy.end_id).nonzero()[:, 0]
        assert mask.sum() == (ends[0] + 1 if rollout.ended[row] else len(ids))
    assert torch.equal(rollout.tokens.loss_mask[:, -rollout.mask.shape[1] :], rollout.mask)


def test_the_score_is_added_at_the_last_token_and_the_kl_is_not_differentiated(load, tmp_path):
    stage = watched(load, objective=PPO(discount=1.0, gae_lambda=1.0, beta=0.3))
    fit(stage, tmp_path, limit_val_batches=0)
    for rollout, scores, x in stage.seen:
        for tensor in (x.logp, x.ref_logp, x.values, x.advantages, x.returns):
            assert not tensor.requires_grad and tensor.dtype == torch.float32
        last = rollout.mask.sum(1) - 1
        final = x.returns.gather(1, last[:, None])[:, 0]
        gap = (x.logp - x.ref_logp).gather(1, last[:, None])[:, 0]
        torch.testing.assert_close(final, scores - 0.3 * gap, atol=1e-4, rtol=1e-4)
        # with lambda = discount = 1 the first return is the score less the whole KL
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
    """For a model whose configuration has dropout, the checks of sampler and ratio would stop the run."""
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


def test_every_epoch_has_its_own_order(load, tmp_path):
    """Each epoch reads every row of the rollout once, and no two orders are equal, within or between rollouts."""
    stage = watched(load, epochs=3, minibatches=2, steps=2)
    updated: list[torch.Tensor] = []
    update, draw, orders = stage.update, stage.draw_minibatches, []

    def noted(experience):
        orders.append(list(draw(torch.arange(len(experience)))))
        return draw(experience)

    stage.draw_minibatches = noted
    stage.update = lambda minibatch, first: updated.append(minibatch.logp) or update(minibatch, first)
    fit(stage, tmp_path, limit_val_batches=0)
    epochs = []
    for rollout in orders:
        assert [first for _, first in rollout] == [True, False, False, False, False, False]
        minibatches = [rows.tolist() for rows, _ in rollout]
        assert [len(rows) for rows in minibatches] == [4] * 6
        epochs += [tuple(a + b) for a, b in zip(minibatches[::2], minibatches[1::2], strict=True)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(8))] * 6
    assert len({*epochs, tuple(range(8))}) == 7
    # and these are the rows that the updates are made on
    expected = [x.logp[rows] for (_, _, x), order in zip(stage.seen, orders, strict=True) for rows, _ in order]
    assert len(updated) == 12 and all(map(torch.equal, updated, expected))


def test_the_learning_rate_changes_once_per_rollout(load, tmp_path):
    seen = []

    def linear(step: int, total: int) -> float:
        seen.append((step, total))
        return 1 - step / total

    stage = varied(load)
    stage._scheduler = linear
    fit(stage, tmp_path, limit_val_batches=0)
    assert seen == [(rollout, 4) for rollout in range(4) for _ in range(4)]


def test_the_adaptive_beta_follows_the_kl_and_is_used(load, tmp_path):
    """A KL far above its target raises beta by a fifth of n / horizon, and the next rollout is rewarded with it."""
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


def test_the_sampler_is_checked_in_half_precision(load, tmp_path):
    class Foreign(AncestralSampler):
        def sample(self, policy, prompts, seed):
            rollout = super().sample(policy, prompts, seed)
            return replace(rollout, logp=rollout.logp - 0.5 * rollout.mask)

    fit(varied(load), tmp_path / "a", precision="bf16-mixed", limit_val_batches=0)
    with pytest.raises(RunFailed, match="sampler"):
        fit(varied(load, sampler=Foreign(10)), tmp_path / "b", precision="bf16-mixed", limit_val_batches=0)


def test_nan_does_not_pass_the_sampler_check(load, tmp_path):
    class Broken(AncestralSampler):
        def sample(self, policy, prompts, seed):
            rollout = super().sample(policy, prompts, seed)
            return replace(rollout, logp=rollout.logp * float("nan"))

    with pytest.raises(RunFailed, match="sampler"):
        fit(varied(load, sampler=Broken(10)), tmp_path, limit_val_batches=0)
