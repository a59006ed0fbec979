"""PPO: invalid inputs are refused, and ranks agree on moments and whitening."""

from pathlib import Path

import pytest
import torch

from rlhf.errors import UserError
from rlhf.functional.masking import masked_mean
from rlhf.models.scalar import ScalarModel
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.testing import tiny_model

from .conftest import fit
from .test_ppo import Watched, rows_of, varied


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """Save a model with another vocabulary."""
    path = tmp_path_factory.mktemp("foreign") / "model"
    tiny_model().save(path)
    return path


def test_a_reference_with_another_vocabulary_is_refused(load, foreign):
    with pytest.raises(UserError, match=r"inputs\.reference=.* another vocabulary .* type inputs\.reference=null"):
        varied(load, reference=str(foreign))


def test_a_reference_that_is_not_a_language_model_is_refused(load, tmp_path):
    ScalarModel.load(load()).save(tmp_path / "reward")
    with pytest.raises(
        UserError, match=r"^inputs\.reference=.*reward: is a reward or value model, .*; type inputs\.ref"
    ):
        varied(load, reference=str(tmp_path / "reward"))


def test_a_critic_with_another_vocabulary_is_refused(load, tmp_path):
    ScalarModel.load(tiny_model()).save(tmp_path / "critic")
    with pytest.raises(UserError, match=r"stage\.value=.* another vocabulary .* type stage\.value=null"):
        varied(load, value=str(tmp_path / "critic"))


def test_kl_is_measured_from_the_configured_reference(load, folder, tmp_path):
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


def test_a_prompt_without_room_for_a_response_is_refused_before_training(load, tmp_path):
    with pytest.raises(UserError, match=r"prompt '.*' has \d+ tokens"):
        fit(varied(load, sampler=AncestralSampler(120)), tmp_path)
    assert not (tmp_path / "metrics.csv").exists() or not rows_of(tmp_path)


def test_minibatches_must_divide_the_batch(load):
    with pytest.raises(UserError, match="stage.batch_size=9"):
        varied(load, batch_size=8, minibatches=3)


# -- several ranks -----------------------------------------------------------------------------------------------------


class OnBoth(Watched):
    """PPO that writes down what it evaluated, on every rank."""

    def on_train_end(self):
        _, scores, x = self.seen[0]
        torch.save(
            {"scores": scores, "advantages": x.advantages, "mask": x.mask, "moments": self.score_moments},
            self.run_directory / f"rank{self.trainer.global_rank}.pt",
        )


def test_whitening_and_moments_cover_both_ranks(load, tmp_path):
    stage = varied(load, normalize_scores="running", steps=1, score_clip=None, missing_eos_penalty=0.0)
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
