"""Reward model stage: rankings of K, both heads, normalisation, calibration, continuing from an earlier model."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from rlhf.annotator.base import completed
from rlhf.data.collate import TokenBatch
from rlhf.data.data import Data
from rlhf.data.encoded_rows import EncodedComparison
from rlhf.data.encoding import encode_comparison
from rlhf.data.formats import FORMATS
from rlhf.data.load_report import LoadReport
from rlhf.data.records import Comparison, Message, Prompt
from rlhf.data.split import Split
from rlhf.data.testbed.world import Testbed
from rlhf.errors import UserError
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.precision import Precision
from rlhf.models.scalar import ScalarModel
from rlhf.sampler.rollout import Rollout
from rlhf.storage.metrics_file import read_rows
from rlhf_reward_model.accuracy import Accuracy, accuracies
from rlhf_reward_model.objective import Pairwise
from rlhf_reward_model.stage import RewardModelStage

from .conftest import adamw, constant, data, fit, same, weights
from .test_exactness import gradient

COMMON = (adamw, constant)


def ranked(size: int = 12, responses: int = 4) -> Split:
    """Load rankings of K responses."""
    return Data("comparison", "testbed", size, 8, 96, testbed=Testbed(responses=responses)).load()


def of(records: list[Comparison], like: Split) -> Split:
    return Split(records, like.validation, LoadReport("here"), like.data)


def stage_on(load, split=None, objective=None, model=None, **hyperparameters) -> RewardModelStage:
    torch.manual_seed(3)
    hyperparameters = {"batch_size": 4, **hyperparameters}
    return RewardModelStage(model or load(), objective or Pairwise(), split or ranked(), *COMMON, **hyperparameters)


# -- rankings of K ---------------------------------------------------------------------------------------------------


def test_the_loss_of_a_ranking_is_divided_by_its_number_of_pairs(load, tmp_path):
    """InstructGPT eq. 1: -1/C(K,2) sum over pairs, then the mean over prompts, for any K of each prompt."""
    four, two = ranked(2, 4), ranked(2, 2)
    records = [*four.train[:2], *two.train[:2]]
    stage = stage_on(load, of(records, four), batch_size=4, normalize="none")
    stage._optimizer = lambda groups: torch.optim.SGD(groups, lr=0.0)
    fit(stage, tmp_path)
    logged = read_rows(tmp_path / "metrics.csv")[0]["loss"]

    means = []
    for record in records:
        (example,), _ = four.data.encode(stage.scorer.tokenizer, [record])
        part = stage.collate([example])
        scores = stage.scorer.scores(
            TokenBatch.of(part.tokens.ids, part.tokens.attention_mask, position_ids=part.tokens.position_ids)
        )
        place = {response: row for row, response in enumerate(example.used)}
        pairs = [-F.logsigmoid(scores[place[i]] - scores[place[j]]) for i, j, _ in record.pairs()]
        k = len(record.responses)
        assert len(pairs) <= k * (k - 1) // 2
        means.append(sum(pairs) / len(pairs))
    assert logged == pytest.approx((sum(means) / len(means)).item(), abs=1e-5)


def apart(records: list[Comparison]) -> list[Comparison]:
    """Return every pair as a separate record, which InstructGPT found to overfit."""
    return [
        Comparison(record.prompt, (record.responses[i], record.responses[j]), (grade,))
        for record in records
        for i, j, grade in record.pairs()
    ]


def test_separately_shuffled_pairs_train_differently(load, tmp_path):
    split = ranked(8, 4)
    rows = {}
    for name, records in {"together": split.train, "apart": apart(split.train)}.items():
        stage = stage_on(load, of(records, split), batch_size=4)
        fit(stage, tmp_path / name)
        rows[name] = (len(stage.batches), stage.examples_seen, weights(stage))
    responses = {name: seen for name, (_, seen, _) in rows.items()}
    # Together each response is read once per epoch; separately once per pair that contains it.
    assert responses["together"] <= 4 * 8 and responses["apart"] > 2 * responses["together"]
    assert rows["apart"][0] > rows["together"][0]
    assert not same(rows["together"][2], rows["apart"][2])


def test_a_ranking_of_k_has_the_mean_loss_of_its_pairs(load, tmp_path):
    """With all pairs in one batch both ways have the same gradient where every prompt has as many pairs."""
    split = ranked(20, 3)
    full = [record for record in split.train if len(record.pairs()) == 3][:2]
    together = gradient(stage_on(load, of(full, split), batch_size=2), tmp_path / "a")
    pairs = gradient(stage_on(load, of(apart(full), split), batch_size=6), tmp_path / "b")
    torch.testing.assert_close(together, pairs, atol=1e-6, rtol=1e-4)


def test_micro_batches_do_not_change_the_gradient_of_rankings(load, tmp_path):
    split = ranked(4, 4)
    found = [
        gradient(stage_on(load, split, micro_batch_size=size, safety_coefficient=0.5), tmp_path / str(size))
        for size in (None, 2, 1)
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=2e-6, rtol=1e-4)


# -- the head --------------------------------------------------------------------------------------------------------


def test_head_init_is_drawn_or_zero(load):
    width = 32
    model = load()
    samples = torch.cat([ScalarModel(model).head.weight.detach().flatten() for _ in range(100)])
    assert samples.std().item() == pytest.approx(1 / math.sqrt(width + 1), rel=0.1)
    assert samples.mean().abs().item() < 0.02
    assert stage_on(load, head_init="zero").scorer.head.weight.abs().max() == 0


def test_a_zero_head_starts_at_log_two(load, tmp_path):
    fit(stage_on(load, head_init="zero"), tmp_path)
    first = read_rows(tmp_path / "metrics.csv")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["accuracy"] == 0.5


# -- normalisation ---------------------------------------------------------------------------------------------------


def test_demonstrations_get_a_mean_of_zero(load, tmp_path):
    """InstructGPT, section 3.5: only a bias, so gaps are unchanged."""
    demonstrations = data("demonstration", 24, 4)
    plain = stage_on(load, normalize="none")
    fit(plain, tmp_path / "none")
    stage = stage_on(load, normalize="demonstrations", demonstrations=demonstrations)
    fit(stage, tmp_path / "demonstrations")
    stage.save(tmp_path / "model")
    stage.scorer = ScalarModel.load(tmp_path / "model").eval()
    assert stage.score_demonstrations().mean().item() == pytest.approx(0.0, abs=1e-5)
    (_, chosen, rejected), (_, before, after) = (
        stage.score_comparisons(stage.examples),
        plain.score_comparisons(plain.examples),
    )
    torch.testing.assert_close(chosen - rejected, before - after, atol=1e-5, rtol=1e-4)


def test_each_normalisation_keeps_the_order_of_scores(load, tmp_path):
    in_the_loss: dict[str, torch.Tensor] = {}
    levels = {}
    for name in ("none", "mean", "standard", "demonstrations"):
        stage = stage_on(load, normalize=name, demonstrations=data("demonstration", 24, 4))
        fit(stage, tmp_path / name)
        scores = stage.score_comparisons(stage.examples)[0]
        in_the_loss[name] = (scores - scores[0]) * stage.scorer.log_odds
        levels[name] = (scores.mean().item(), scores.std().item(), scores.argsort().tolist())
    assert levels["mean"][0] == pytest.approx(0, abs=1e-5) and levels["mean"][1] == pytest.approx(levels["none"][1])
    assert levels["standard"][:2] == pytest.approx((0, 1), abs=1e-4)
    assert len({round(mean, 4) for mean, *_ in levels.values()}) >= 3
    assert all(order == levels["none"][2] for *_, order in levels.values())
    for gaps in in_the_loss.values():  # the gaps that the gate of Llama 2 reads do not depend on the normalisation
        torch.testing.assert_close(gaps, in_the_loss["none"], atol=1e-4, rtol=1e-4)


def test_normalising_by_demonstrations_needs_demonstrations(load):
    with pytest.raises(UserError, match="data@demonstrations=demonstrations"):
        stage_on(load, normalize="demonstrations")


# -- accuracy and its error -----------------------------------------------------------------------------------------


def test_accuracy_by_grade_is_written_with_its_standard_error(load, tmp_path):
    stage = stage_on(load, data("comparison", 32, 16))
    fit(stage, tmp_path)
    left, logged = json.loads((tmp_path / "accuracy.json").read_text()), stage.trainer.callback_metrics
    assert left["all"]["accuracy"] == pytest.approx(logged["val/accuracy"].item(), abs=1e-6)
    assert left["all"]["pairs"] == sum(len(one.pairs) for one in stage.held_out)
    assert sum(found["pairs"] for grade, found in left.items() if grade != "all") == left["all"]["pairs"]
    for grade in left.keys() - {"all"}:
        assert left[grade]["accuracy"] == pytest.approx(logged[f"val/accuracy/{grade}"].item(), abs=1e-6)
        assert stage.final_metrics().get(f"val/accuracy_se/{grade}") == left[grade]["standard_error"]
    assert stage.final_metrics()["val/accuracy_se"] == left["all"]["standard_error"] > 0


def test_scores_after_training_use_the_precision_of_training(load, tmp_path):
    """Scores for the normalisation are those of training, which differ between bf16 and fp32."""

    class Watched(RewardModelStage):
        def finish(self) -> None:
            assert torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
            super().finish()

    stage = stage_on(load, data("comparison", 32, 16))
    stage.__class__ = Watched
    logged = fit(stage, tmp_path, precision="bf16-mixed")
    left = json.loads((tmp_path / "accuracy.json").read_text())
    assert left["all"]["accuracy"] == pytest.approx(logged["val/accuracy"], abs=1e-6)


def test_accuracy_of_pairs_of_one_prompt_by_hand():
    """Prompt 7 has two comparisons, one of two pairs; prompt 8 has one. Shares are 1/2, 1/2, 1, 1."""
    first = EncodedComparison([7], [[1], [2], [3]], [(0, 1, "better"), (0, 2, "slightly")])
    second, third = (EncodedComparison([prompt], [[1], [2]], [(0, 1, "slightly")]) for prompt in (7, 8))
    found = accuracies([first, second, third], torch.tensor([1.0, 0.0, 0.0, 1.0]))
    # All: (0.5 + 1) / 3 = 1/2; prompt 7 has 0.5 of 2, so 0.5 - 1 = -1/2, prompt 8 has 1 - 1/2 = +1/2.
    assert found["all"] == Accuracy(0.5, pytest.approx(math.sqrt(2 * (0.25 + 0.25)) / 3), 4, 2, 2)
    # "slightly": (0 + 0 + 1) / 3; 0 - 2/3 and 1 - 1/3.
    assert found["slightly"] == Accuracy(pytest.approx(1 / 3), pytest.approx(math.sqrt(2 * 2 * 4 / 9) / 3), 3, 2, 2)
    assert found["better"] == Accuracy(1.0, None, 1, 1, 1)
    assert list(found) == ["all", "slightly", "better"]


def test_paraphrased_prompts_are_one_cluster_of_an_accuracy():
    """Three prompts of a pair each, two of which paraphrase each other: residuals 2 - 2 * 2/3 and 0 - 2/3."""
    rows = [EncodedComparison([p], [[1], [2]], [(0, 1, None)], cluster=c) for p, c in ((7, "x"), (8, "x"), (9, ""))]
    found = accuracies(rows, torch.tensor([1.0, 1.0, 0.0]))["all"]
    assert found == Accuracy(pytest.approx(2 / 3), pytest.approx(math.sqrt(2 * (4 / 9 + 4 / 9)) / 3), 3, 3, 2)


def test_a_comparison_keeps_the_cluster_of_its_prompt(load):
    held_out = data("comparison", 8, 200).validation
    prompts = {prompt.messages: prompt.cluster for prompt in data("prompt", 8, 400).validation}
    known = [record for record in held_out if record.prompt in prompts]
    assert len(known) > 20 and all(record.cluster == prompts[record.prompt] != "" for record in known)
    assert len({record.cluster for record in held_out}) < len({record.prompt for record in held_out})
    assert [Comparison.from_json(record.to_json()) for record in known] == known
    assert FORMATS["preference"](known[0].to_json() | {"cluster": 7}).cluster == "7"
    encoded, _ = encode_comparison(load().tokenizer, known[0])
    assert encoded is not None and encoded.cluster == known[0].cluster
    asked = Prompt((Message("user", "a"),), cluster="c")
    row = torch.ones(2, 1)
    rollout = Rollout([asked] * 2, row.long(), row.bool(), row.long(), row.bool(), row, row[:, 0].bool(), ["x", "y"])
    found = completed(rollout, [Comparison(asked.messages, ("y", "x"))])
    assert found == [Comparison(asked.messages, ("y", "x"), ended=(True, True), cluster="c")]


# -- calibration -----------------------------------------------------------------------------------------------------


def test_calibration_and_scores_are_written_to_files(load, tmp_path, figures):
    stage = stage_on(load, data("comparison", 32, 16))
    fit(stage, tmp_path)
    curve = json.loads((tmp_path / "calibration.json").read_text())
    counts = json.loads((tmp_path / "score_histogram.json").read_text())
    assert curve["ece"] == stage.final_metrics()["val/calibration_error"]
    assert sum(one["count"] for one in curve["bins"]) == curve["pairs"] == sum(counts["chosen"])
    for name in ("calibration.png", "score_histogram.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_calibration_does_not_depend_on_the_normalisation(load, tmp_path):
    found = {}
    for name in ("none", "standard"):
        stage = stage_on(load, data("comparison", 32, 16), normalize=name, epochs=3)
        fit(stage, tmp_path / name)
        found[name] = stage.final_metrics()
    assert found["none"] == pytest.approx(found["standard"], abs=1e-5)


# -- continuing from an earlier reward model -------------------------------------------------------------------------


def test_training_continues_from_an_earlier_reward_model(load, tmp_path):
    first = stage_on(load, epochs=4, normalize="standard")
    fit(first, tmp_path / "first")
    first.save(tmp_path / "first" / "model")
    spec = CausalLM(str(tmp_path / "first"), None, None)
    assert spec.scalar
    model = RewardModelStage.load_model(spec, NoAdapter(), Precision("32-true"), None)
    second = stage_on(load, model=model, head_init="zero")
    assert torch.equal(second.scorer.head.weight, first.scorer.head.weight)
    assert second.scorer.scale.item() == pytest.approx(first.scorer.scale.item())
    second._optimizer = lambda groups: torch.optim.SGD(groups, lr=0.0)
    fit(second, tmp_path / "second")
    rows = read_rows(tmp_path / "second" / "metrics.csv")
    _, chosen, rejected = first.score_comparisons(second.examples)
    _, here, there = second.score_comparisons(second.examples)
    torch.testing.assert_close(chosen - rejected, here - there, atol=1e-4, rtol=1e-3)
    assert rows[0]["loss"] != pytest.approx(math.log(2), abs=1e-4)


# -- bad input ---------------------------------------------------------------------------------------------


def written(folder, rows) -> str:
    file = folder / "comparisons.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def row(chosen="yes", rejected="no", **fields) -> dict:
    return {"prompt": "q", "chosen": chosen, "rejected": rejected, **fields}


def test_equal_responses_are_dropped_and_counted(tmp_path):
    source = written(tmp_path, [row(chosen=str(i), rejected="no") for i in range(9)] + [row("same", "same")])
    split = Data("comparison", source, None, 0, 96).load()
    assert len(split.train) == 9 and "1 dropped as ties" in str(split.report)
    with pytest.raises(UserError, match="no usable comparisons .*2 dropped as ties"):
        Data("comparison", written(tmp_path, [row("same", "same")] * 2), None, 0, 96).load()


def test_an_undefined_grade_is_reported_in_one_line(tmp_path):
    source = written(tmp_path, [row(grade="superb")] * 3)
    with pytest.raises(UserError, match="row 1: grade: 'superb' is not one of negligible, slightly") as error:
        Data("comparison", source, None, 0, 96).load()
    assert len(str(error.value).splitlines()) == 1


def test_margins_need_grades(load, tmp_path):
    split = data("comparison")
    bare = [replace(record, grades=()) for record in split.train]
    with pytest.raises(UserError, match="objective.margin=none"):
        fit(stage_on(load, of(bare, split), Pairwise(margin="small")), tmp_path)


def test_every_metric_is_in_the_readme(load, tmp_path):
    from tests.conf.test_docs import unexplained

    stage = stage_on(load, safety_coefficient=0.5)
    metrics = {*fit(stage, tmp_path), *stage.final_metrics()}
    assert "val/safety_recall" in metrics and unexplained("rlhf_reward_model", metrics) == set()
