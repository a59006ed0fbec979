"""Samplers that are not the policy: their mismatch is logged and corrected; the policy's own stays exact."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf.errors import RunFailed
from rlhf.functional.sampler_mismatch import correction_weights
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.precision import Precision
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.base import Sampler
from rlhf.storage.metrics_file import read_rows
from rlhf_grpo.objective import GRPO
from rlhf_grpo.stage import GRPOStage
from rlhf_ppo.objective import PPO
from rlhf_ppo.stage import PPOStage
from rlhf_rloo.objective import RLOO
from rlhf_rloo.stage import RLOOStage

from .conftest import adamw, constant, data, fit, same, weights
from .hyperparameters import Varied

KINDS = {"ppo": (PPOStage, PPO, 1), "grpo": (GRPOStage, GRPO, 3), "rloo": (RLOOStage, RLOO, 3)}
MISMATCH = ("token_mult_prob_error", "sampler_gap")


def stage(kind: str, load, sampler: Sampler | None = None, lora: bool = False, tolerance: float = 1e-3, **objective):
    make, loss, samples = KINDS[kind]
    return make(
        load(lora),
        loss(**objective),
        data("prompt", 16, 4),
        None,
        Varied(),
        sampler or AncestralSampler(8, samples=samples),
        adamw,
        constant,
        batch_size=4,
        steps=2,
        epochs=1,
        minibatches=2,
        tolerance=tolerance,
    )


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [row for row in read_rows(folder / "metrics.csv") if "first_ratio" in row]


class Shifted(AncestralSampler):
    """Sampler of another model than the policy, by its own account: its log-probabilities are off by given amounts."""

    matches_policy = False

    def __init__(self, *arguments, gap: float, **named) -> None:
        super().__init__(*arguments, **named)
        self.gap = gap

    def sample(self, policy, prompts, seed):
        rollout = super().sample(policy, prompts, seed)
        sign = torch.where(rollout.response_ids % 2 == 0, 1.0, -1.0)
        return replace(rollout, logp=rollout.logp + self.gap * sign * rollout.mask)


class ByFile(Sampler):
    """Sampler with a model of its own, which reads the policy's weights from a directory, as an engine does."""

    matches_policy = False

    def __init__(self, folder: Path, samples: int) -> None:
        super().__init__(8, samples=samples)
        self.folder, self.inner = folder, AncestralSampler(8, samples=samples)

    def sample(self, policy, prompts, seed):
        policy.save(self.folder)
        model = CausalLM(str(self.folder), None, None).load(NoAdapter(), Precision("bf16-true")).frozen()
        assert str(next(model.parameters()).dtype) == "torch.bfloat16"
        return self.inner.sample(model, prompts, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_the_policys_own_sampler_needs_no_second_pass_and_no_correction(kind, load, tmp_path, monkeypatch):
    """The policy scores no rollout; with the correction on, the weights have the same bits."""
    ended = []
    for mode in ("none", "sequence_mask"):
        run = stage(kind, load, sampler_correction=mode, correction_max=1.0001)
        compute, passes = run.policy.logprobs, []

        def spied(*arguments, compute=compute, passes=passes, **named):
            passes.append(torch.is_grad_enabled())
            return compute(*arguments, **named)

        monkeypatch.setattr(run.policy, "logprobs", spied)
        fit(run, tmp_path / mode, limit_val_batches=0)
        assert all(passes), "a pass without gradients scored the rollout again"
        assert not {*MISMATCH, "sampler_weight"} & set(rows_of(tmp_path / mode)[0])
        ended.append(weights(run))
    assert same(*ended)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mismatch_of_another_sampler_is_logged(kind, load, tmp_path):
    """Of a sampler that is off by 0.02 nats at every token, in both directions."""
    sampler = Shifted(8, samples=KINDS[kind][2], gap=0.02)
    fit(stage(kind, load, sampler), tmp_path)
    for row in rows_of(tmp_path):
        assert row["sampler_gap"] == pytest.approx(0.02, abs=1e-5)
        assert row["token_mult_prob_error"] == pytest.approx(torch.tensor(0.02).exp().item(), abs=1e-5)
        assert row["first_ratio"] == pytest.approx(1, abs=1e-6)  # the ratio is to the policy, not to the sampler
    assert any("val/sampler_gap" in row for row in read_rows(tmp_path / "metrics.csv"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_correction_multiplies_the_policy_loss_of_a_rollout(kind, load, tmp_path):
    """The stage passes the weights of the whole rollout on to its minibatches, and logs them."""
    mode = "sequence_truncate" if kind == "rloo" else "token_truncate"
    sampler = Shifted(8, samples=KINDS[kind][2], gap=0.04)
    run = stage(kind, load, sampler, sampler_correction=mode, correction_max=1.01)
    fit(run, tmp_path / "on", limit_val_batches=0)
    plain = stage(kind, load, sampler)
    fit(plain, tmp_path / "off", limit_val_batches=0)
    assert not same(weights(run), weights(plain))
    row = rows_of(tmp_path / "on")[0]
    assert 0 < row["sampler_bounded"] < 1 and row["sampler_weight"] < 1.01
    assert "sampler_weight" not in rows_of(tmp_path / "off")[0]
    # masking all responses leaves no policy loss
    nothing = stage(kind, load, sampler, sampler_correction="sequence_mask", correction_max=1e-6)
    fit(nothing, tmp_path / "nothing", limit_val_batches=0)
    masked = rows_of(tmp_path / "nothing")[0]
    assert masked["policy_loss"] == masked["sampler_weight"] == 0 and masked["sampler_bounded"] == 1
    assert row["policy_loss"] != 0


@pytest.mark.parametrize("lora", [False, True])
def test_a_copy_in_16_bits_samples_from_the_present_weights(lora, load):
    policy = load(lora)
    prompts = data("prompt", 16, 4).train[:4]
    sampler = AncestralSampler(8, samples=3, precision="bf16")
    first = sampler.sample(policy, prompts, seed=0)
    assert next(policy.parameters()).dtype == torch.float32
    plain = AncestralSampler(8, samples=3).sample(policy, prompts, seed=0)
    same_tokens = (plain.response_ids[:, :1] == first.response_ids[:, :1])[:, 0]
    gap = (plain.logp - first.logp)[same_tokens, 0].abs()
    assert same_tokens.any() and 0 < gap.max() < 0.1
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    renewed = sampler.sample(policy, prompts, seed=0)
    fresh = AncestralSampler(8, samples=3, precision="bf16").sample(policy, prompts, seed=0)
    assert torch.equal(renewed.logp, fresh.logp) and not torch.equal(renewed.logp, first.logp)


def test_a_run_with_a_sampler_in_16_bits(load, tmp_path):
    """Policy in fp32: the mismatch is that of bfloat16, and the correction's weights are about 1."""
    run = stage("grpo", load, AncestralSampler(8, samples=3, precision="bf16"), sampler_correction="token_truncate")
    fit(run, tmp_path)
    for row in rows_of(tmp_path):
        assert 1e-5 < row["sampler_gap"] < 0.05 and 1 < row["token_mult_prob_error"] < 1.05
        assert row["sampler_weight"] == pytest.approx(1, abs=0.02) and row["sampler_bounded"] == 0


@pytest.mark.parametrize("lora", [False, True])
def test_a_sampler_may_read_the_weights_from_files(lora, load, tmp_path):
    """As an engine in another process does; the adapter is merged into what it reads."""
    run = stage("grpo", load, ByFile(tmp_path / "weights", 3), lora)
    fit(run, tmp_path / "run", limit_val_batches=0)
    assert all(0 < row["sampler_gap"] < 0.05 for row in rows_of(tmp_path / "run"))


def test_a_sampler_of_another_distribution_stops_the_run(load, tmp_path):
    """A mean gap beyond 50 times the tolerance is no rounding: stale weights, or another temperature."""
    with pytest.raises(RunFailed, match="sampler's log-probabilities differ"):
        fit(stage("grpo", load, Shifted(8, samples=3, gap=0.1)), tmp_path)
    fit(stage("grpo", load, Shifted(8, samples=3, gap=0.1), tolerance=0.01), tmp_path / "wider")


def test_weighted_responses_estimate_the_policys_expectation():
    """Importance weights make the mean over the sampler's tokens the mean under the policy, up to the bound's bias."""
    generator = torch.Generator().manual_seed(0)
    policy, sampler = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.3, 0.3])
    value = torch.tensor([1.0, 5.0, -2.0])
    tokens = torch.multinomial(sampler, 200_000, replacement=True, generator=generator)[None]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    found, _ = correction_weights(policy.log()[tokens], sampler.log()[tokens], mask, "token_truncate", None, 3.0)
    expected = (policy * value).sum()
    assert (found * value[tokens]).mean().item() == pytest.approx(expected.item(), abs=0.03)
    assert value[tokens].float().mean().item() != pytest.approx(expected.item(), abs=0.2)
