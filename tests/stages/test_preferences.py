"""Every loss of the DPO family in its stage: from data to weights, and what must not change them."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from rlhf.data.collate import TokenBatch
from rlhf.data.data import Data
from rlhf.data.records import Comparison, Label, Message
from rlhf.data.split import Split
from rlhf.errors import UserError
from rlhf.functional.logprobs import token_logprobs
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.language_model import LanguageModel
from rlhf.models.precision import Precision
from rlhf.objective import ContrastObjective, LabelObjective
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.storage.metrics_file import read_rows
from rlhf_dpo.batch_objective import KTO
from rlhf_dpo.objective import DPO, DPONLL, ORPO, SimPO
from rlhf_dpo.pairs import pair_logps
from rlhf_dpo.stage import DPOStage

from .conftest import ARCHITECTURE, adamw, constant, data, fit, same, weights
from .test_exactness import Stop, gradient

ROOT = Path(__file__).resolve().parents[2]
OBJECTIVES = sorted(ROOT.glob("plugins/rlhf_dpo/conf/objective/*.yaml"))
Load = Callable[..., LanguageModel]


def named(name: str, **hyperparameters: object):
    """Build an objective as its YAML does."""
    return instantiate(
        OmegaConf.merge(OmegaConf.load(ROOT / f"plugins/rlhf_dpo/conf/objective/{name}.yaml"), hyperparameters)
    )


def stage(load: Load, objective, records: Split | None = None, lora: bool = False, **hyperparameters) -> DPOStage:
    hyperparameters = {"batch_size": 8, "epochs": 2, **hyperparameters}
    return DPOStage(load(lora), objective, records or data("comparison"), adamw, constant, **hyperparameters)


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, atol=2e-4, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")


# -- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", OBJECTIVES, ids=lambda path: path.stem)
def test_every_loss_trains(path: Path, load: Load, tmp_path: Path) -> None:
    """As in `rlhf stage=dpo objective=NAME`. Each hyperparameter's effect is tested in test_every_hyperparameter."""

    def trained(**hyperparameters: object) -> dict[str, torch.Tensor]:
        folder = tmp_path / "-".join(map(str, ["run", *hyperparameters.values()]))
        run = stage(load, named(path.stem, **hyperparameters))
        fit(run, folder, limit_train_batches=2, limit_val_batches=0)
        assert all(math.isfinite(row["loss"]) for row in read_rows(folder / "metrics.csv"))
        return weights(run)

    before = trained()
    assert not same(before, weights(stage(load, named(path.stem)))), "the weights did not change"
    if "pooling" in OmegaConf.load(path):  # of the examples that the stage embeds
        assert not same(trained(pooling="last"), before)


@pytest.mark.parametrize("name", ["kto", "relative", "relative_diagonal", "relative_unpaired", "reward_aware", "orpo"])
def test_micro_batches_do_not_change_the_weights(name: str, load: Load, tmp_path: Path) -> None:
    """1 x 8, 2 x 4 and 8 x 1, for losses that read the whole batch and for others; metrics too."""
    results, metrics = [], []
    for size in (None, 4, 1):
        run = stage(load, named(name), micro_batch_size=size)
        fit(run, tmp_path / str(size), limit_train_batches=2, limit_val_batches=0)
        results.append(weights(run))
        metrics.append(read_rows(tmp_path / str(size) / "metrics.csv"))
    for other, rows in zip(results[1:], metrics[1:], strict=True):
        close(results[0], other)
        for row, expected in zip(rows, metrics[0], strict=True):
            for key in row.keys() - {"reference_gap", "accuracy"}:  # these two are rounding errors at step 0
                assert row[key] == pytest.approx(expected[key], abs=2e-4, rel=2e-3), key


@pytest.mark.parametrize("name", ["kto", "relative", "relative_unpaired"])
def test_a_killed_run_resumes_bit_for_bit(name: str, load: Load, tmp_path: Path) -> None:
    whole = stage(load, named(name))
    metrics = fit(whole, tmp_path / "whole")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(stage(load, named(name)), tmp_path / "killed", callbacks=[Stop(2, tmp_path / "killed")])
    (checkpoint,) = (tmp_path / "killed" / "checkpoints").glob("*.ckpt")
    resumed = stage(load, named(name))
    again = fit(resumed, tmp_path / "killed", resume=checkpoint)
    assert same(weights(resumed), weights(whole)) and again == metrics


# -- the reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [SimPO(), ORPO(), DPO(reference_free=True)], ids=repr)
def test_no_reference_is_loaded_for_reference_free_losses(
    objective, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "rlhf.models.auxiliary_models.start_reference", lambda policy: pytest.fail("a reference was made")
    )
    assert stage(load, objective).reference is None
    with pytest.raises(UserError, match="has no reference"):
        stage(load, objective, reference="anything")


@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_is_the_initial_policy_and_is_freed(lora: bool, load: Load, tmp_path: Path) -> None:
    """Also with an adapter, which moves: the reference log-probabilities stay those of the untrained model."""
    start = load(lora)
    run = stage(load, DPO(), lora=lora)
    fit(run, tmp_path, limit_train_batches=3)
    assert run.reference is None
    part = run.collate(list(run.examples[:4]))
    with torch.no_grad():
        expected = start.logprobs(
            TokenBatch.of(part.tokens.ids, part.tokens.attention_mask, part.tokens.loss_mask, part.tokens.position_ids)
        )[0].sum(dim=1)
        now = pair_logps(run.policy, part).chosen
    torch.testing.assert_close(part.reference, expected, atol=1e-3, rtol=1e-4)
    assert (now - expected[part.chosen]).abs().max() > 1e-2


def test_dropout_is_off_in_policy_and_reference(folder: Path, load: Load, tmp_path: Path) -> None:
    """With dropout on, the log-ratios of step 0 would not be 0."""

    def dropping(lora: bool = False) -> LanguageModel:
        model = load(lora)
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
        return model.train()

    fit(stage(dropping, DPO()), tmp_path, limit_train_batches=1)
    row = read_rows(tmp_path / "metrics.csv")[0]
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-6) and row["reference_gap"] < 1e-3


def other_model(folder: Path, seed: int, records: str = "demonstration", vocabulary: int = 320) -> Path:
    torch.manual_seed(seed)
    spec = CausalLM(None, ARCHITECTURE, vocabulary)
    spec.load(NoAdapter(), Precision("32-true"), corpus=data(records, 200).texts).save(folder)
    return folder


def test_the_configured_reference_is_read(load: Load, tmp_path: Path) -> None:
    other = other_model(tmp_path / "other", seed=5)
    run = stage(load, DPO(), reference=str(other))
    fit(run, tmp_path / "run", limit_train_batches=1)
    row = read_rows(tmp_path / "run" / "metrics.csv")[0]
    assert row["reference_gap"] > 0.1 and row["loss"] != pytest.approx(math.log(2), abs=1e-4)
    model = CausalLM(str(other), None, None).load(NoAdapter(), Precision("32-true"))
    part = run.collate(list(run.examples[:4]))
    torch.testing.assert_close(part.reference[part.chosen], pair_logps(model, part).chosen, atol=1e-3, rtol=1e-4)


def test_a_reference_with_another_vocabulary_is_refused(load: Load, tmp_path: Path) -> None:
    other = other_model(tmp_path / "other", seed=5, vocabulary=300)
    with pytest.raises(UserError, match=r"inputs.reference=.*another vocabulary than the policy \(300 .* against 320"):
        stage(load, DPO(), reference=str(other))


# -- batches of pairs -----------------------------------------------------------------------------------------------


def test_padding_and_the_rest_of_the_batch_do_not_change_a_pair(load: Load, tmp_path: Path) -> None:
    """Chosen and rejected padded together, or each read alone: the same log-probabilities (fp32)."""
    run = stage(load, DPO())
    fit(run, tmp_path, limit_train_batches=1)
    whole = run.collate(list(run.examples))
    together = pair_logps(run.policy, whole)
    alone = [pair_logps(run.policy, run.collate([example])) for example in run.examples]
    torch.testing.assert_close(together.chosen, torch.cat([x.chosen for x in alone]), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(together.rejected, torch.cat([x.rejected for x in alone]), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(whole.reference, torch.cat([run.collate([e]).reference for e in run.examples]))


def test_prompt_tokens_are_masked_and_log_probabilities_are_summed(load: Load, tmp_path: Path) -> None:
    run = stage(load, DPO())
    fit(run, tmp_path, limit_train_batches=1)
    example = run.examples[0]
    part = run.collate([example])
    row = example.prompt + example.responses[example.pairs[0][0]]
    hidden = run.policy.hidden(TokenBatch.of(torch.tensor([row]), torch.ones(1, len(row))))[0]
    by_hand, _ = token_logprobs(hidden[:-1], torch.tensor(row[1:]), run.policy.head)
    expected = by_hand[len(example.prompt) - 1 :]
    logps = pair_logps(run.policy, part)
    torch.testing.assert_close(logps.chosen[0], expected.sum(), atol=1e-4, rtol=1e-5)
    assert logps.chosen_length[0] == len(expected) == len(example.responses[example.pairs[0][0]])


def test_pairs_of_equal_responses_never_reach_the_loss() -> None:
    question = (Message("user", "Where?"),)
    ranking = Comparison(question, ("Here.", "Here.", "There."))
    assert [pair[:2] for pair in ranking.pairs()] == [(0, 2), (1, 2)]
    assert Comparison(question, ("Here.", "Here.")).pairs() == []


def test_a_response_longer_than_the_context_is_refused(load: Load, tmp_path: Path) -> None:
    records = data("comparison")
    long = Comparison((Message("user", "Where?"),), ("word " * 200, "no"))
    records = replace(records, train=[*records.train, long], data=Data("comparison", "testbed", 32, 8, 4096))
    with pytest.raises(UserError, match=r"more than the model's context of 128; type data.max_length=128"):
        fit(stage(load, DPO(), records), tmp_path)


def test_iterated_dpo_starts_each_round_at_log_two(load: Load, folder: Path, tmp_path: Path) -> None:
    """The reference of a round is the policy at the start of the round."""
    first = stage(load, DPO())
    fit(first, tmp_path / "1", limit_train_batches=3)
    first.save(tmp_path / "1" / "model")
    second = CausalLM(str(tmp_path / "1" / "model"), None, None)
    run = stage(lambda lora=False: second.load(NoAdapter(), Precision("32-true")), DPO())
    fit(run, tmp_path / "2", limit_train_batches=1)
    assert read_rows(tmp_path / "2" / "metrics.csv")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


# -- kto ------------------------------------------------------------------------------------------------------------


def test_kto_reads_labels_and_comparisons(load: Load, tmp_path: Path) -> None:
    for record in ("label", "comparison"):
        run = stage(load, KTO(), data(record))
        assert {type(x) for x in run.data.train} == {Label}
        fit(run, tmp_path / record, limit_train_batches=2)
        first = read_rows(tmp_path / record / "metrics.csv")[0]
        assert first["loss"] == pytest.approx(0.5, abs=1e-6) and first["kl"] == pytest.approx(0.0, abs=1e-4)


def test_kto_fits_its_labels(load: Load, tmp_path: Path) -> None:
    run = stage(load, KTO(beta=0.5), data("comparison", 8, 2), epochs=80, batch_size=16)
    fit(run, tmp_path, limit_val_batches=0)
    last = read_rows(tmp_path / "metrics.csv")[-1]
    assert last["accuracy"] > 0.75 and last["loss"] < 0.4  # from 0.5 each


def test_kto_reference_point_is_the_mismatched_mean_over_the_batch(load: Load, tmp_path: Path) -> None:
    run = stage(load, KTO(), micro_batch_size=3)
    fit(run, tmp_path, limit_train_batches=3)
    chosen = list(run.examples[:8])
    z = run.batch_adapter.batch_terms(run.policy, list(run.parts(chosen)))
    with torch.no_grad():
        ratios = []
        for example in chosen:
            assert example.mismatched not in [x.response for x in run.examples if x.prompt == example.prompt]
            row = run.collate([example]).mismatched
            logp = run.policy.logprobs(TokenBatch.of(row.ids, row.attention_mask, row.loss_mask, row.position_ids))[
                0
            ].sum()
            ratios.append(float(logp) - example.mismatched_reference)
    assert not z.requires_grad
    assert float(z) == pytest.approx(max(0.0, sum(ratios) / len(ratios)), abs=1e-4)


def test_kto_has_no_gradient_through_the_reference_point(load: Load, tmp_path: Path) -> None:
    """The gradient is that of the loss with z held fixed at its value."""
    run = stage(load, KTO())
    got = gradient(run, tmp_path)
    part = run.collate([run.examples[i] for i in next(iter(run.batches))])
    policy = load()
    losses, _ = run.batch_adapter.losses(policy, part, torch.tensor(0.0), 0)  # at the start z = 0
    losses.mean().backward()
    expected = {name: p.grad for name, p in policy.named_parameters()}
    assert got.norm() == pytest.approx(float(sum(g.square().sum() for g in expected.values()).sqrt()), rel=1e-3)


def test_kto_labels_of_a_ranking_are_its_winners_and_losers() -> None:
    from rlhf.data.record_conversion import comparison_labels

    question = (Message("user", "Where?"),)
    found = comparison_labels(Comparison(question, ("a", "b", "c")))
    assert [(label.response, label.desirable) for label in found] == [("a", True), ("c", False)]
    tied = comparison_labels(Comparison(question, ("a", "b", "c"), grades=("tie", None, None)))
    assert [(label.response, label.desirable) for label in tied] == [("a", True), ("b", True), ("c", False)]


def test_wrong_records_are_refused(load: Load) -> None:
    with pytest.raises(UserError, match="holds labels; type data=comparisons or objective=kto"):
        stage(load, DPO(), data("label"))
    with pytest.raises(UserError, match="holds demonstrations"):
        stage(load, KTO(), data("demonstration"))
    labels = data("label")
    with pytest.raises(UserError, match="all responses are good"):
        stage(load, KTO(), replace(labels, train=[x for x in labels.train if x.desirable]))
    one = replace(labels, train=[replace(x, prompt=labels.train[0].prompt) for x in labels.train])
    with pytest.raises(UserError, match="responses to several prompts"):
        fit(stage(load, KTO(), one), Path("/tmp"))


def test_dpo_nll_adds_the_mean_not_the_sum(load: Load, tmp_path: Path) -> None:
    fit(stage(load, DPONLL(nll_coefficient=1.0)), tmp_path, limit_train_batches=1)
    row = read_rows(tmp_path / "metrics.csv")[0]
    assert row["loss"] == pytest.approx(math.log(2) - row["chosen_logp"], abs=1e-4)
    assert row["dpo_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_samples_of_a_label_run_are_written(load: Load, tmp_path: Path) -> None:
    run = stage(load, KTO(), data("label"))
    fit(run, tmp_path, limit_train_batches=1)
    run.write_samples(2, AncestralSampler(4))
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 2


def test_samples_skip_prompts_that_do_not_fit(load: Load, tmp_path: Path) -> None:
    """Prompts that were dropped as too long must not stop a finished run."""
    records = data("label")
    long = replace(records.validation[0], prompt=(Message("user", "word " * 200),))
    run = stage(load, KTO(), replace(records, validation=[long, *records.validation]))
    fit(run, tmp_path, limit_train_batches=1)
    run.write_samples(2, AncestralSampler(4))
    assert "word word" not in (tmp_path / "samples.jsonl").read_text()


def test_all_objectives_on_labels_are_tested() -> None:
    found = [path.stem for path in OBJECTIVES if isinstance(named(path.stem), LabelObjective | ContrastObjective)]
    assert found == ["kto", "relative_unpaired"]
