"""Collect stage: its files do not depend on kills or on the number of ranks."""

import json
import random
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from rlhf.annotator.gold import GoldAnnotator
from rlhf.annotator.reward import RewardAnnotator
from rlhf.console import silence_libraries
from rlhf.data.data import Data
from rlhf.data.encoding import encode_prompt
from rlhf.data.testbed.world import Testbed
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.base import Sampler
from rlhf.storage.batch_file import BatchFile
from rlhf_collect.stage import CollectStage, agreement

from .conftest import Scored, data, dies


def three_samples() -> Sampler:
    return AncestralSampler(8, samples=3)


def collect(load, folder: Path, sampler: Sampler | None = None, annotator=None, **trainer) -> dict[str, float]:
    """Run the stage over 10 prompts in batches of 3; return its metrics, except on several ranks."""
    silence_libraries()
    warnings.filterwarnings("ignore", category=FutureWarning)
    folder.mkdir(parents=True, exist_ok=True)
    annotator = annotator or GoldAnnotator()
    stage = CollectStage(load(), data("prompt", 10, 2), sampler or three_samples(), annotator, batch_size=3)
    stage.run_directory = folder
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    runner = pl.Trainer(**{"accelerator": "cpu", "devices": 1, "use_distributed_sampler": False, **off, **trainer})
    runner.predict(stage, return_predictions=False)
    return stage.final_metrics() if runner.world_size == 1 else {}


def test_a_killed_collection_and_two_ranks_write_the_same_file(load, tmp_path):
    metrics = collect(load, tmp_path / "whole")
    expected = (tmp_path / "whole" / "comparisons.jsonl").read_bytes()
    assert expected and metrics["prompts"] == 10

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        collect(load, tmp_path / "killed", dies(three_samples(), 2))
    part = tmp_path / "killed" / "comparisons.part0.jsonl"
    assert len(part.read_text().splitlines()) == 2
    with part.open("a") as file:
        file.write('{"batch": 2, "compar')  # truncated
    assert collect(load, tmp_path / "killed", dies(three_samples(), 2)) == metrics  # two of the four batches remained
    assert (tmp_path / "killed" / "comparisons.jsonl").read_bytes() == expected

    collect(load, tmp_path / "two", devices=2, strategy="ddp_fork")
    assert (tmp_path / "two" / "comparisons.jsonl").read_bytes() == expected
    assert not list(tmp_path.glob("*/*.part*"))


@pytest.mark.parametrize("aspect", ["total", "helpfulness", "safety"])
def test_an_annotator_without_noise_agrees_with_gold_of_its_aspect(aspect):
    world, rng = Testbed(), random.Random(0)
    questions = world.questions(40, rng)
    prompts = [world.prompt(question) for question in questions]
    responses = [[world.response(question, rng) for _ in range(4)] for question in questions]
    asked = SimpleNamespace(prompts=[prompt for prompt in prompts for _ in range(4)], texts=sum(responses, []))
    asked.ended = torch.ones(len(asked.texts), dtype=torch.bool)
    comparisons = GoldAnnotator(noise=0.0, aspect=aspect)(asked, 4, seed=0)
    counts = agreement(SimpleNamespace(prompts=prompts), comparisons, aspect)
    assert counts["right"] == counts["of"] > 40
    other = agreement(SimpleNamespace(prompts=prompts), comparisons, "safety" if aspect != "safety" else "helpfulness")
    assert other["right"] < other["of"]


class Forgetful(GoldAnnotator):
    """Annotator that sets no `ended`, as those of plugins may."""

    def __call__(self, rollout, samples, seed):
        return [replace(comparison, ended=None) for comparison in super().__call__(rollout, samples, seed)]


@pytest.mark.parametrize("kind", [GoldAnnotator, Forgetful, RewardAnnotator])
def test_truncated_responses_are_collected_as_such(kind, load, tmp_path):
    """From the sampler over the file to the tokens: no end is trained that was not sampled."""
    annotator = RewardAnnotator(Scored(lambda rollout: rollout.lengths.float())) if kind is RewardAnnotator else kind()
    policy = load()
    head = policy.base.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]).index_fill_(0, torch.tensor(policy.end_id), 4.0))
    samples = three_samples().sample(policy.eval(), data("prompt", 10, 2).train, 0)
    assert 0.2 < samples.ended.float().mean() < 0.9  # both kinds

    seen = []

    class Watched(AncestralSampler):
        def sample(self, *arguments):
            seen.append(super().sample(*arguments))
            return seen[-1]

    metrics = collect(lambda: policy, tmp_path, Watched(8, samples=3), annotator)
    ended = {(p.messages, t): e for r in seen for p, t, e in zip(r.prompts, r.texts, r.ended.tolist(), strict=True)}
    data_ = Data("comparison", str(tmp_path / "comparisons.jsonl"), None, 0, 128)
    records = data_.load().train
    marks = [mark for record in records for mark in record.ended]
    assert marks == [ended[record.prompt, text] for record in records for text in record.responses]
    assert metrics["cut_share"] == pytest.approx(marks.count(False) / len(marks)) and 0 < metrics["cut_share"] < 1
    rows, report = data_.encode(policy.tokenizer, records)
    assert [response[-1:] == [policy.end_id] for row in rows for response in row.responses] == marks
    assert report.missing_eos == marks.count(False)


def test_helpfulness_and_safety_are_judged_on_different_responses(load, tmp_path):
    responses = []
    for aspect in ("helpfulness", "safety"):
        collect(load, tmp_path / aspect, annotator=GoldAnnotator(aspect=aspect))
        rows = map(json.loads, (tmp_path / aspect / "comparisons.jsonl").read_text().splitlines())
        responses.append({(str(row["prompt"]), response) for row in rows for response in row["responses"]})
    assert responses[0] and not responses[0] & responses[1]


def test_batches_are_divided_over_ranks_and_kept(tmp_path):
    first, second = (BatchFile(tmp_path, "work", rank, 2) for rank in (0, 1))
    assert (list(first.mine(5)), list(second.mine(5))) == ([0, 2, 4], [1, 3])
    first.add(2, value="zwei\n")
    second.add(1, value=1)
    assert first.read() == {1: {"batch": 1, "value": 1}, 2: {"batch": 2, "value": "zwei\n"}}
    with second.path.open("a") as file:
        file.write('{"batch": 3')
    # Another attempt, on one rank: batches that either of the two finished are not computed again.
    alone = BatchFile(tmp_path, "work")
    assert list(alone.mine(5)) == [0, 3, 4]
    assert BatchFile(tmp_path, "work", 1, 2).path.read_text() == json.dumps({"batch": 1, "value": 1}) + "\n"
    alone.remove()
    assert not list(tmp_path.iterdir())


def test_prompts_that_are_too_long_are_dropped_and_reported(load, tmp_path, capsys):
    split = data("prompt", 10, 2)
    lengths = sorted(len(encode_prompt(load().tokenizer, prompt.messages)) for prompt in split.train)
    split.data.max_prompt_length = lengths[6]
    kept = sum(length <= lengths[6] for length in lengths)
    assert kept < 10
    stage = CollectStage(load(), split, AncestralSampler(8, samples=2), GoldAnnotator(), batch_size=4)
    stage.run_directory = tmp_path
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    pl.Trainer(accelerator="cpu", **off).predict(stage, return_predictions=False)
    assert sum(row["prompts"] for row in stage.rows) == kept
    assert f"{10 - kept} dropped as too long" in capsys.readouterr().out
