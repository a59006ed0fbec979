"""Safety head of the reward model: its labels, its loss, and how it is saved."""

import math
from dataclasses import replace

import pytest
import torch

from rlhf.data.collate import TokenBatch
from rlhf.data.encoding import encode_comparison
from rlhf.data.records import Comparison, Message
from rlhf.errors import UserError
from rlhf.models.scalar import ScalarModel
from rlhf.reward.model import ModelReward
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.storage.metrics_file import read_rows

from .conftest import data, fit
from .test_reward_model import of, stage_on


def test_the_safety_head_separates_unsafe_responses(load, tmp_path):
    split = data("comparison", 64, 32)
    stage = stage_on(load, split, safety_coefficient=1.0, epochs=30, batch_size=16)
    metrics = fit(stage, tmp_path)
    rows = read_rows(tmp_path / "metrics.csv")
    assert rows[0]["safety_loss"] == pytest.approx(math.log(2), abs=1e-5)  # from w = 0
    assert rows[0]["loss"] == pytest.approx(rows[0]["ranking_loss"] + math.log(2), abs=1e-5)
    assert metrics["safety_accuracy"] > 0.9
    assert {"val/safety_loss", "val/safety_accuracy", "val/safety_recall"} <= set(metrics)


def test_without_a_coefficient_there_is_no_safety_head(load, tmp_path):
    stage = stage_on(load)
    fit(stage, tmp_path)
    stage.save(tmp_path / "model")
    assert stage.scorer.safety_head is None and not (tmp_path / "model" / "safety_head.safetensors").exists()
    assert not any("safety" in name for row in read_rows(tmp_path / "metrics.csv") for name in row)


def test_the_safety_head_is_saved_with_the_model(load, tmp_path):
    stage = stage_on(load, safety_coefficient=0.5)
    fit(stage, tmp_path)
    stage.save(tmp_path / "model")
    loaded = ScalarModel.load(tmp_path / "model")
    assert loaded.safety_head is not None and loaded.safety_head.weight.abs().max() > 0
    assert torch.equal(loaded.safety_head.weight, stage.scorer.safety_head.weight)
    again = stage_on(load, model=loaded, safety_coefficient=0.5)
    assert torch.equal(again.scorer.safety_head.weight, stage.scorer.safety_head.weight)
    assert stage_on(load, model=ScalarModel.load(tmp_path / "model")).scorer.safety_head is None


def test_the_safety_head_needs_responses_of_both_kinds(load, tmp_path):
    split = data("comparison")
    safe = [replace(record, unsafe=(False,) * len(record.responses)) for record in split.train]
    with pytest.raises(UserError, match="harmful and harmless responses, and every response of here .* is harmless"):
        fit(stage_on(load, of(safe, split), safety_coefficient=0.1), tmp_path)
    tagged = [replace(record, unsafe=None) for record in split.train]
    assert any("unsafe" in record.tags for record in tagged)
    with pytest.raises(UserError, match="no response of here has a label; type stage.safety_coefficient=0"):
        fit(stage_on(load, of(tagged, split), safety_coefficient=0.1), tmp_path)


def test_the_safety_head_is_trained_on_labels_alone(load, tmp_path):
    """A comparison without labels moves the ranking and not the head, whatever its prompt's tags are.

    From w = 0 the gradient of the head's bias is the mean over labelled prompts of 1/2 - share of harmful responses,
    times their share of the batch.
    """
    prompt = (Message("user", "How can I rob Mia?"),)
    labelled = Comparison(prompt, ("I will not help.", "Take it."), tags=("unsafe",), unsafe=(False, True))
    harmless = Comparison(prompt, ("No, never.", "Sorry, no."), tags=("unsafe",), unsafe=(False, False))
    without = Comparison(prompt, ("Please do not.", "Gladly."), tags=("unsafe",))
    split = of([labelled, harmless, without, replace(without, responses=("No.", "Yes."))], data("comparison"))
    stage = stage_on(load, split, safety_coefficient=0.5, batch_size=4, normalize="none", gradient_clip=None)
    stage._optimizer = lambda groups: torch.optim.SGD(groups, lr=1.0)
    fit(stage, tmp_path, limit_val_batches=0)
    assert stage.scorer.safety_head.bias.item() == pytest.approx(-0.5 * (0.0 + 0.5) / 4, abs=1e-6)
    row = read_rows(tmp_path / "metrics.csv")[0]
    assert row["safety_loss"] == pytest.approx(math.log(2), abs=1e-5)  # the mean over the labelled prompts
    assert row["loss"] == pytest.approx(row["ranking_loss"] + 0.5 * math.log(2) * 2 / 4, abs=1e-5)


def test_a_truncated_response_is_scored_as_in_ppo(load, tmp_path):
    """The score of a truncated response in training equals ModelReward's: at its last token, without an end."""
    scorer = ScalarModel.load(load()).eval()
    scorer.save(tmp_path / "reward")
    sampled = AncestralSampler(6, samples=2).sample(load().eval(), data("prompt", 8, 2).train, 0)
    assert not sampled.ended.any()
    sampled.ended[::4] = True
    pairs = range(0, len(sampled.texts), 2)
    records = [
        Comparison(
            sampled.prompts[i].messages, tuple(sampled.texts[i : i + 2]), ended=tuple(sampled.ended[i : i + 2].tolist())
        )
        for i in pairs
    ]
    stage = stage_on(load, of(records, data("comparison")), model=ScalarModel.load(tmp_path / "reward"))
    examples, _ = stage.data.data.encode(stage.scorer.tokenizer, records)
    assert len(examples) == len(pairs)
    tokens = stage.collate(list(examples)).tokens
    scores = stage.scorer.eval().scores(
        TokenBatch.of(tokens.ids, tokens.attention_mask, position_ids=tokens.position_ids)
    )
    torch.testing.assert_close(scores, ModelReward(str(tmp_path / "reward"))(sampled), atol=1e-5, rtol=1e-5)


def test_responses_without_a_label_stay_unlabelled():
    split = data("comparison")
    record = Comparison((Message("user", "How can I rob Mia?"),), ("Take it.", "No."), tags=("unsafe",))
    marked = replace(record, unsafe=(True, False))
    from rlhf.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["How can I rob Mia?"] * 5, 300)
    assert encode_comparison(tokenizer, record)[0].unsafe == ()
    assert encode_comparison(tokenizer, marked)[0].unsafe == (True, False)
    assert Comparison.from_json(marked.to_json()) == marked
    assert any(True in record.unsafe for record in split.train if record.unsafe)
    with pytest.raises(ValueError, match="3 marks"):
        replace(record, unsafe=(True, False, True))
