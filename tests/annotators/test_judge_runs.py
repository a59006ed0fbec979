"""Language model as annotator in runs: its training data, the rates of a collect run, and the file of answers."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rlhf.annotator.judge_text import TEMPLATES, fill
from rlhf.annotator.judgements import Judgements
from rlhf.data.data import Data
from rlhf.data.records import Comparison
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.rollout import Rollout
from rlhf.testing import rollout, tiny_model

from .conftest import Scripted, given, longer

# -- training a judge -----------------------------------------------------------------------------------------------


def test_judgements_are_both_orders_of_every_pair() -> None:
    comparisons = Data("comparison", "testbed", 16, 4, 128)
    split = Judgements(comparisons).load()
    source = comparisons.load()
    assert len(split.train) == 2 * sum(len(x.pairs()) for x in source.train) and len(split.validation) == 8
    assert Counter(x.messages[-1].content for x in split.train) == {"A": 16, "B": 16}
    first, exchanged = split.train[:2]
    pair = source.train[0]
    assert first.messages[0].content == fill(TEMPLATES["short"], pair.prompt, *pair.responses)
    assert exchanged.messages[0].content == fill(TEMPLATES["short"], pair.prompt, *pair.responses[::-1])
    digests = {Judgements(comparisons).digest(), Judgements(comparisons, "instruction").digest()}
    assert len(digests) == 2
    rows, report = split.encode(tiny_model().tokenizer, "train")
    assert all(sum(row.mask) == 2 for row in rows)  # the letter and the end of the turn


# -- in a run of the collect stage ------------------------------------------------------------------------------------


def test_agreement_with_gold_counts_pairs_that_gold_separates() -> None:
    from rlhf.data.testbed.world import Testbed
    from rlhf_collect.stage import agreement

    world = Testbed()
    prompt = next(p for p in world.prompts(20, 0) if not p.unsafe)
    value = prompt.reference
    asked = rollout(["x"], ["y"])
    asked = Rollout(**{**asked.__dict__, "prompts": [prompt]})
    good, bad, same = f"It is {value}.", "You fool.", "Go away."

    def counted(*comparisons: Comparison) -> dict[str, int]:
        return agreement(asked, list(comparisons))

    right = Comparison(prompt.messages, (good, bad), ("better",))
    wrong = Comparison(prompt.messages, (bad, good), ("slightly",))
    assert counted(right, wrong) == {
        "of": 2, "right": 1, "of/better": 1, "right/better": 1, "of/slightly": 1, "right/slightly": 0,
    }  # fmt: skip
    assert counted(Comparison(prompt.messages, (bad, same))) == {}
    assert counted(Comparison(prompt.messages, (good, bad), ("tie",))) == {}


def test_the_summary_of_collect_has_the_rates_of_the_judge(folder: Path, tmp_path: Path) -> None:
    import pytorch_lightning as pl

    from rlhf.annotator.gold import GoldAnnotator
    from rlhf_collect.stage import CollectStage
    from tests.stages.conftest import data

    def metrics(annotator: object, name: str) -> dict[str, float]:
        stage = CollectStage(tiny_model(), data("prompt", 8), AncestralSampler(8, samples=2), annotator, batch_size=4)
        stage.run_directory = tmp_path / name / "collect" / "abc"
        stage.run_directory.mkdir(parents=True)
        quiet: Sequence[str] = ("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary")
        trainer = pl.Trainer(accelerator="cpu", devices=1, **dict.fromkeys(quiet, False))
        trainer.predict(stage, return_predictions=False)
        return stage.final_metrics()

    judged = metrics(Scripted(folder, longer), "judge")
    assert judged["judge/pairs"] == 8 and 0 <= judged["judge/position_bias"] <= 1
    assert (tmp_path / "judge" / "judge").is_dir()
    assert not any(name.startswith("judge") for name in metrics(GoldAnnotator(noise=0.0), "gold"))


def test_cached_answers_are_json_lines(folder: Path, tmp_path: Path) -> None:
    judge = Scripted(folder, longer)
    judge.open(tmp_path)
    judge(given("aa", "a"), 2, 0)
    (file,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["answer"] for row in rows] == [1.0, -1.0] and {row["said"] for row in rows} == {"A", "B"}
