"""Preference stage with objectives that read scores or the other prompts of the batch."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf.data.collate import TokenBatch
from rlhf.data.data import Data
from rlhf.data.records import Comparison, Label, Message
from rlhf.errors import UserError
from rlhf.storage.metrics_file import read_rows
from rlhf_dpo.batch_objective import Relative, RelativeDiagonal, RelativeUnpaired, contrasts
from rlhf_dpo.embedding import pooled
from rlhf_dpo.objective import DPO, RewardAware

from .conftest import data, fit, same, weights
from .test_exactness import gradient
from .test_preferences import Load, named, other_model, stage


def test_reward_aware_needs_scores_and_reads_them(load: Load, tmp_path: Path) -> None:
    records = data("comparison")
    bare = replace(records, train=[replace(records.train[0], scores=None), *records.train[1:]])
    with pytest.raises(UserError, match="1 of 40 comparisons have none"):
        stage(load, RewardAware(), bare)
    run = stage(load, RewardAware(score_scale=3.0))
    fit(run, tmp_path, limit_train_batches=1)
    part = run.collate(list(run.examples))
    record = run.data.train[0]
    gap = run.batch_adapter._context([part])
    assert float(gap.chosen_score[0] - gap.rejected_score[0]) == pytest.approx(record.scores[0] - record.scores[1])


@pytest.mark.parametrize("objective", [Relative(), RelativeDiagonal()], ids=repr)
def test_relative_needs_more_than_one_prompt(objective, load: Load) -> None:
    with pytest.raises(UserError, match="stage.batch_size=1: .* type stage.batch_size=2 or more"):
        stage(load, objective, batch_size=1)


def test_the_gradient_of_relative_by_micro_batches_equals_that_of_the_batch(load: Load, tmp_path: Path) -> None:
    run = stage(load, Relative(), reference=None)
    whole = gradient(run, tmp_path / "whole")
    # another reference makes the log-ratios of step 0 differ from 0, so that every weight matters
    cut = gradient(stage(load, Relative(), micro_batch_size=3), tmp_path / "cut")
    torch.testing.assert_close(cut, whole, atol=1e-5, rtol=1e-3)
    other = other_model(tmp_path / "other", seed=5)
    at = {
        size: gradient(stage(load, Relative(), micro_batch_size=size, reference=str(other)), tmp_path / f"{size}")
        for size in (None, 1)
    }
    torch.testing.assert_close(at[1], at[None], atol=1e-4, rtol=1e-3)


def test_the_gradient_of_relative_unpaired_by_micro_batches_equals_that_of_the_batch(
    load: Load, tmp_path: Path
) -> None:
    other = str(other_model(tmp_path / "other", seed=5))
    whole, cut = (
        gradient(
            stage(load, RelativeUnpaired(), data("label"), micro_batch_size=size, reference=other), tmp_path / f"{size}"
        )
        for size in (None, 3)
    )
    assert whole.norm() > 1e-3
    torch.testing.assert_close(cut, whole, atol=1e-5, rtol=1e-3)


def test_relative_unpaired_reads_labels_and_starts_at_log_two(load: Load, tmp_path: Path) -> None:
    run = stage(load, RelativeUnpaired(), data("label", 64), epochs=4, batch_size=16)
    fit(run, tmp_path, limit_val_batches=0)
    rows = read_rows(tmp_path / "metrics.csv")
    assert {type(x) for x in run.data.train} == {Label}
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and rows[0]["accuracy"] == pytest.approx(
        0.5, abs=0.3
    )
    assert rows[-1]["loss"] < math.log(2) and rows[-1]["accuracy"] > 0.5
    with pytest.raises(UserError, match="good responses of a batch with its bad ones; type stage.batch_size=2"):
        stage(load, RelativeUnpaired(), data("label"), batch_size=1)


def test_a_batch_of_one_kind_does_not_change_the_policy(load: Load, tmp_path: Path) -> None:
    """Neither momentum nor weight decay moves it."""
    records = data("label")
    good = [label for label in records.train if label.desirable]
    run = stage(
        load, RelativeUnpaired(), replace(records, train=[*good, next(x for x in records.train if x not in good)])
    )
    run._optimizer = lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.5)
    before = weights(run)
    collate = run.batch_adapter.collate
    run.batch_adapter.collate = lambda examples, pad: replace(
        collate(examples, pad), desirable=torch.ones(len(examples)).bool()
    )
    fit(run, tmp_path)
    assert same(before, weights(run))


def test_prompts_are_embedded_by_the_reference_without_their_padding(load: Load, tmp_path: Path) -> None:
    run = stage(load, Relative())
    fit(run, tmp_path, limit_train_batches=2)
    start = load()
    for example in run.examples[:3]:
        ids = torch.tensor([example.prompt])
        hidden = start.hidden(TokenBatch.of(ids, torch.ones_like(ids)))[0]
        torch.testing.assert_close(example.embedding, hidden.mean(dim=0), atol=1e-4, rtol=1e-4)


def test_pooling_by_hand() -> None:
    hidden, mask = torch.arange(12.0).view(1, 4, 3), torch.tensor([[0, 1, 1, 0]]).bool()
    assert pooled(hidden, mask, "mean").tolist() == [[4.5, 5.5, 6.5]]
    assert pooled(hidden, mask, "last").tolist() == [[6.0, 7.0, 8.0]]


def test_the_configured_encoder_embeds_the_prompts(load: Load, tmp_path: Path) -> None:
    other = other_model(tmp_path / "other", seed=7, vocabulary=300)
    run = stage(load, Relative(encoder=str(other)))
    fit(run, tmp_path / "run", limit_train_batches=1)
    by_reference = stage(load, Relative())
    fit(by_reference, tmp_path / "reference", limit_train_batches=1)
    assert not torch.equal(run.examples[0].embedding, by_reference.examples[0].embedding)
    with pytest.raises(UserError, match="objective.encoder=./nowhere/at-all"):
        fit(stage(load, Relative(encoder="./nowhere/at-all")), tmp_path / "bad")
    unpaired = stage(load, RelativeUnpaired(encoder=str(other)), data("label"))
    fit(unpaired, tmp_path / "unpaired", limit_train_batches=1)
    assert torch.isfinite(unpaired.examples[0].embedding).all()


def test_no_response_of_a_ranking_is_contrasted_with_a_better_one(load: Load, tmp_path: Path) -> None:
    """Pairs (1, 2) and (2, 3) of one prompt: 2 must not be raised above itself, nor contrasted with 1."""
    records = Data("comparison", "testbed", 16, 4, 96)
    records.testbed.responses = 3
    run = stage(load, RelativeDiagonal(own_weight=0.0), records.load())
    fit(run, tmp_path, limit_train_batches=1)
    part = run.collate(list(run.examples[:2]))
    context = run.batch_adapter._context([run.collate([run.examples[0]]), run.collate([run.examples[1]])])
    assert len(set(context.prompt_index.tolist())) == 2
    count = len(run.examples[0].pairs)
    _, counts = contrasts(torch.zeros(len(part)), torch.zeros(len(part)), context)
    assert torch.equal(counts[:count, :count], torch.eye(count).bool()) and counts[:count, count:].all()


@pytest.mark.parametrize("micro_batch_size", [None, 1])
@pytest.mark.parametrize("name", ["relative", "relative_diagonal"])
def test_no_response_is_contrasted_with_itself_in_another_record(
    name: str, micro_batch_size: int | None, load: Load, tmp_path: Path
) -> None:
    """Two records a > b and c > a of one prompt have their own pairs and no others, so the loss is DPO's.

    Numbered by record, c would be contrasted with b, and a with itself; in one batch or in micro-batches of one record.
    """
    split = data("comparison")
    prompt = (Message("user", "Where does Mia live?"),)
    records = [Comparison(prompt, pair) for pair in (("In Rome.", "Who knows?"), ("Mia lives in Rome.", "In Rome."))]
    split = replace(split, train=records, validation=[])
    other = load()
    with torch.no_grad():
        other.base.get_input_embeddings().weight.mul_(1.2)  # log-ratios that are not 0
    other.save(tmp_path / "reference")
    hyperparameters = {
        "batch_size": 2,
        "epochs": 1,
        "reference": str(tmp_path / "reference"),
        "micro_batch_size": micro_batch_size,
    }
    found = []
    for objective in (named(name, beta=0.1), DPO(beta=0.1)):
        folder = tmp_path / type(objective).__name__
        fit(stage(load, objective, split, **hyperparameters), folder)
        found.append(read_rows(folder / "metrics.csv")[0]["loss"])
    assert found[0] == pytest.approx(found[1], abs=1e-6) and abs(found[1] - math.log(2)) > 1e-3
