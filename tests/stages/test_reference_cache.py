"""Reference log-probabilities are computed once for all runs with the same reference and the same rows."""

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load as stored_tensors
from safetensors.torch import save_file

from rlhf.data.split import Split
from rlhf.models.reference import Reference, start_reference
from rlhf.models.reference_cache import cached_logprobs
from rlhf.storage.metrics_file import read_rows
from rlhf_dpo.batch_objective import KTO
from rlhf_dpo.objective import DPO
from rlhf_dpo.stage import DPOStage

from .conftest import adamw, constant, data, fit, same, weights

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import pathlib, sys
from rlhf.storage import locks

with locks.lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""
CPU = torch.device("cpu")
ROWS = [([5, 6, 7], [8, 9]), ([5, 6, 7], [10]), ([11], [12, 13, 14, 15]), ([5, 6, 7], [8, 9])]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the empty directory of cached log-probabilities."""
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the number of rows of every forward pass of a reference."""
    counted: list[int] = []
    compute = Reference.logprobs

    def spied(self, tokens, temperature=1.0):
        counted.append(len(tokens))
        return compute(self, tokens, temperature)

    monkeypatch.setattr(Reference, "logprobs", spied)
    return counted


def trained(load, folder: Path, beta: float = 0.1, records: Split | None = None, lora: bool = False, **options):
    """Train DPO for a few steps; return its rows of metrics and its weights."""
    stage = DPOStage(
        load(lora), DPO(beta=beta), records or data("comparison"), adamw, constant, **{"batch_size": 8} | options
    )
    fit(stage, folder)
    return [{k: v for k, v in row.items() if "_s" not in k} for row in read_rows(folder / "metrics.csv")], weights(
        stage
    )


def files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.glob("*") if path.suffix == ".safetensors")


def test_a_sweep_over_beta_computes_them_once(load, tmp_path, monkeypatch, cache, forwards):
    """Each run has the bits that it has with a cache of its own."""
    sweep = {beta: trained(load, tmp_path / f"{beta}", beta) for beta in (0.1, 0.5)}
    once = sum(forwards)
    assert len(files(cache)) == 1 and list(cache.iterdir()) == files(cache)  # no lock or scratch file is left
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "another"))
    for beta, (rows, ended) in sweep.items():
        alone, alone_ended = trained(load, tmp_path / f"alone {beta}", beta)
        assert [row["loss"] for row in alone if "loss" in row] == [row["loss"] for row in rows if "loss" in row]
        assert same(ended, alone_ended)
    assert sum(forwards) == 2 * once and once == len(set(rows_of(data("comparison"), load)))


def rows_of(split: Split, load) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the prompt and response of every response that is in a pair."""
    examples = [x for part in ("train", "validation") for x in split.encode(load().tokenizer, part)[0]]
    return [(tuple(x.prompt), tuple(x.responses[index])) for x in examples for index in x.used]


def test_micro_batches_and_the_order_of_rows_do_not_matter(load, tmp_path, cache, forwards):
    trained(load, tmp_path / "a")
    computed = len(forwards)
    shuffled = list(data("comparison").train)
    random.Random(0).shuffle(shuffled)
    trained(load, tmp_path / "b", records=replace(data("comparison"), train=shuffled), micro_batch_size=2)
    trained(load, tmp_path / "c", lora=True, batch_size=4)  # the base under an adapter is the same reference
    assert len(forwards) == computed and len(files(cache)) == 1


def test_they_are_those_of_the_plain_computation(load):
    """The sum of log softmax over the response, row by row without padding."""
    model = load()
    found = cached_logprobs(start_reference(model), ROWS, model.pad_id, CPU)
    for (prompt, response), value in zip(ROWS, found, strict=True):
        with torch.no_grad():
            logits = model.base(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()
        assert value == pytest.approx(float(expected), abs=1e-4)


def test_other_rows_weights_precisions_and_architectures_have_other_files(load, cache):
    model = load()

    def count(rows=ROWS, **settings) -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(settings.get("autocast"))):
            cached_logprobs(start_reference(model), rows, model.pad_id, CPU)
        return len(files(cache))

    assert count() == count(ROWS[::-1]) == count(ROWS[:3]) == 1
    assert count(ROWS[1:3]) == 2
    assert count([([5, 6], [7, 8, 9]), *ROWS[1:3]]) == 3  # the same tokens with a longer response
    assert count(autocast=True) == 4
    with torch.no_grad():
        model.base.get_input_embeddings().weight[0, 0] += 1e-6
    assert count() == 5
    model.base.config.rms_norm_eps *= 2
    assert count() == 6
    model.to(torch.bfloat16)
    assert count() == 7


def test_a_trained_adapter_that_is_on_is_part_of_the_reference(load, cache):
    """A frozen model with an adapter is another reference than its base."""
    model = load(lora=True)
    cached_logprobs(Reference(model), ROWS, model.pad_id, CPU)
    cached_logprobs(Reference(model, shared=False), ROWS, model.pad_id, CPU)
    assert len(files(cache)) == 2


@pytest.mark.parametrize("damage", ["torn", "changed", "renamed", "other", "empty"])
def test_a_damaged_or_foreign_file_is_computed_anew(damage, load, cache, forwards):
    model = load()
    expected = cached_logprobs(start_reference(model), ROWS, model.pad_id, CPU)
    (file,) = files(cache)
    whole = file.read_bytes()
    if damage == "torn":
        file.write_bytes(whole[:-2])
    elif damage == "changed":
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "renamed":  # whole, of another set of as many rows
        cached_logprobs(start_reference(model), [*ROWS[:2], ([1], [2])], model.pad_id, CPU)
        next(other for other in files(cache) if other != file).replace(file)
    elif damage == "other":
        save_file({"weight": torch.zeros(3)}, file)
    else:
        file.write_bytes(b"")
    before = len(forwards)
    assert cached_logprobs(start_reference(model), ROWS, model.pad_id, CPU) == expected
    assert len(forwards) > before
    assert torch.equal(stored_tensors(file.read_bytes())["logp"], stored_tensors(whole)["logp"])


def test_without_a_cache_they_are_computed(load, tmp_path, monkeypatch, forwards):
    model = load()
    expected = cached_logprobs(start_reference(model), ROWS, model.pad_id, CPU)
    (tmp_path / "file").touch()
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "file"))  # where no directory can be
    before = len(forwards)
    assert cached_logprobs(start_reference(model), ROWS, model.pad_id, CPU) == expected and len(forwards) > before


def test_a_run_waits_for_the_one_that_computes(load, cache, forwards):
    """The lock is another process's; the file appears while this one waits, and nothing is computed here."""
    model = load()
    expected = cached_logprobs(start_reference(model), ROWS, model.pad_id, CPU)
    (file,) = files(cache)
    content = file.read_bytes()
    file.unlink()
    words = [sys.executable, "-c", HOLD, str(file.with_suffix(".lock"))]  # without torch, whose import takes seconds
    other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    before, notes = len(forwards), []

    def note(text: str) -> None:
        notes.append(text)
        file.write_bytes(content)
        other.communicate("release\n")

    assert cached_logprobs(start_reference(model), ROWS, model.pad_id, CPU, note=note) == expected
    assert len(notes) == 1 and len(forwards) == before


def test_the_file_names_what_it_holds(load, cache):
    model = load()
    cached_logprobs(start_reference(model), ROWS, model.pad_id, CPU)
    with safe_open(files(cache)[0], "pt") as stored:
        assert stored.get_tensor("logp").shape == (3,) and len(stored.metadata()["sha256"]) == 64
        assert stored.metadata()["reference"] == str(model.base.config._name_or_path)


@pytest.mark.parametrize("parts", [slice(None), slice(1)], ids=["with mismatched responses", "alone"])
def test_labelled_responses_read_theirs_and_those_of_mismatched_ones(parts, load, tmp_path, forwards):
    """KTO's stage attaches to each example the values of its own rows."""
    stage = DPOStage(load(), KTO(), data("label"), adamw, constant, batch_size=8)
    fit(stage, tmp_path / "run", limit_train_batches=1)
    model = load()
    for example in stage.examples[:4]:
        rows = [(example.prompt, example.response), (example.prompt, example.mismatched)][parts]
        values = cached_logprobs(start_reference(model), rows, model.pad_id, CPU)
        assert values == pytest.approx([example.reference, example.mismatched_reference][parts], abs=1e-4)
