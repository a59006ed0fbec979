"""Reward and value models."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from rlhf.data.collate import TokenBatch
from rlhf.errors import UserError
from rlhf.models.adapters import NoAdapter
from rlhf.models.language_model import LanguageModel
from rlhf.models.module_state import check_gradients
from rlhf.models.scalar import ScalarModel
from tests.models.conftest import FP32, random_model, spec

Batch = tuple[Tensor, Tensor, Tensor]


def test_the_score_is_the_value_of_the_last_token(model: LanguageModel, batch: Batch) -> None:
    ids, mask, _ = batch
    scalar = ScalarModel.load(model)
    values, scores = scalar.values(TokenBatch.of(ids, mask)), scalar.scores(TokenBatch.of(ids, mask))
    assert values.shape == (3, 10) and scores.shape == (3,)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = scalar.scores(TokenBatch.of(ids[row : row + 1, :length], mask[row : row + 1, :length]))
        torch.testing.assert_close(scores[row], values[row, length - 1])
        torch.testing.assert_close(scores[row : row + 1], alone, atol=1e-5, rtol=1e-5)
        left = torch.nn.functional.pad(ids[row, :length], (4, 0))[None]
        torch.testing.assert_close(
            scalar.scores(TokenBatch.of(left, torch.arange(4 + length)[None] >= 4)), alone, atol=1e-5, rtol=1e-5
        )


def test_the_last_token_can_be_the_padding_token(model: LanguageModel) -> None:
    ids = torch.tensor([[10, 11, model.pad_id, 0, 0]])
    mask = torch.tensor([[True, True, True, False, False]])
    scalar = ScalarModel(model)
    torch.testing.assert_close(scalar.scores(TokenBatch.of(ids, mask)), scalar.values(TokenBatch.of(ids, mask))[:, 2])


def test_a_saved_model_scores_equally_in_plain_transformers(folder: Path, batch: Batch, tmp_path: Path) -> None:
    ids, mask, _ = batch
    scalar = ScalarModel.load(folder)
    raw = scalar.scores(TokenBatch.of(ids, mask))
    scalar.calibrate(raw.detach())
    scalar.save(tmp_path / "model")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert plain.config.num_labels == 1
    torch.testing.assert_close(plain(input_ids=ids, attention_mask=mask.long()).logits[:, 0], raw)
    again = ScalarModel.load(tmp_path / "model")
    torch.testing.assert_close(again.scores(TokenBatch.of(ids, mask)), scalar.scores(TokenBatch.of(ids, mask)))
    gaps = again.scores(TokenBatch.of(ids, mask)) - again.scores(TokenBatch.of(ids, mask))[0]
    torch.testing.assert_close(gaps * again.log_odds, raw - raw[0])  # what the loss read
    assert set(json.loads((tmp_path / "model" / "rlhf.json").read_text())) == {"scale", "bias", "log_odds"}


def test_a_reward_model_is_refused_as_policy(model: LanguageModel, tmp_path: Path) -> None:
    ScalarModel(model).save(tmp_path / "model")
    with pytest.raises(UserError, match="language model is needed"):
        spec(tmp_path).load(NoAdapter(), FP32)


def test_calibrated_scores_have_mean_0_and_std_1(model: LanguageModel, batch: Batch) -> None:
    ids, mask, _ = batch
    scalar = ScalarModel(model)
    for _ in range(2):  # a second time from an already calibrated state
        scalar.calibrate(scalar.scores(TokenBatch.of(ids, mask)).detach())
        std, mean = torch.std_mean(scalar.scores(TokenBatch.of(ids, mask)).detach())
        torch.testing.assert_close(torch.stack([mean, std]), torch.tensor([0.0, 1.0]), atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="equal"):
        scalar.calibrate(torch.ones(4))


@pytest.mark.parametrize("tied", [True, False])
def test_every_trainable_parameter_is_used(batch: Batch, tied: bool) -> None:
    ids, mask, _ = batch
    scalar = ScalarModel(random_model(tie_word_embeddings=tied))
    scalar.values(TokenBatch.of(ids, mask)).sum().backward()
    check_gradients(scalar)


def test_head_initialisation(folder: Path, batch: Batch) -> None:
    ids, mask, _ = batch
    torch.manual_seed(0)
    head = ScalarModel(random_model()).head.weight
    assert head.std().item() == pytest.approx(1 / math.sqrt(65), rel=0.3)  # 64 draws
    assert (ScalarModel.load(folder, zero_init=True).values(TokenBatch.of(ids, mask)) == 0).all()


def test_a_head_on_a_causal_model_is_saved_in_the_same_form(model: LanguageModel, batch: Batch, tmp_path: Path) -> None:
    ids, mask, _ = batch
    scalar = ScalarModel.load(model)
    scalar.save(tmp_path / "model")
    torch.testing.assert_close(
        ScalarModel.load(tmp_path / "model").scores(TokenBatch.of(ids, mask)), scalar.scores(TokenBatch.of(ids, mask))
    )


def test_scores_are_float32_when_the_model_is_cast(model: LanguageModel, batch: Batch) -> None:
    ids, mask, _ = batch
    scalar = ScalarModel(model)
    scalar.bias.fill_(1 / 3)
    scalar.to(torch.bfloat16)
    assert scalar.scores(TokenBatch.of(ids, mask)).dtype == torch.float32
    assert scalar.bias.item() == pytest.approx(1 / 3, abs=1e-7)
