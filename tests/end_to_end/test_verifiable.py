"""Critic-free RL through the command line: exact-match rewards, swapped algorithms, tools, wrong settings."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.commands import Done, only
from tests.end_to_end.conftest import MODEL

Rlhf = Callable[..., Done]

SMALL = [
    "pipeline=verifiable",
    *MODEL,
    "sft.data.size=64",
    "sft.data.arithmetic.calls=0.5",
    "sft.stage.batch_size=32",
    "sft.stage.epochs=1",
    "align.data.size=32",
    "align.data.validation=8",
    "align.sampler.max_new_tokens=8",
    "align.sampler.samples=2",
    "align.stage.steps=2",
    "align.stage.batch_size=4",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of one SFT run that all tests share."""
    return tmp_path_factory.mktemp("verifiable")


@pytest.mark.parametrize(
    "words, stage",
    [
        ([], "grpo"),
        (["objective@align.objective=dr_grpo"], "grpo"),
        (["objective@align.objective=dapo", "align.objective.beta=0.1"], "grpo"),
        (["stage@align=rloo"], "rloo"),
        (["sampler@align.sampler=tools", "~align.sampler.tools.search", "align.sampler.max_result_tokens=8"], "grpo"),
        (["align.reward.extract=regex", "align.reward.pattern='is (\\d+)'"], "grpo"),
    ],
    ids=["grpo", "dr_grpo", "dapo", "rloo", "tools", "regex"],
)
def test_the_pipeline_runs_from_an_empty_directory(rlhf: Rlhf, folder: Path, words: list[str], stage: str):
    before = set((folder / "outputs" / stage).glob("*"))
    done = rlhf(folder, *SMALL, *words)
    assert done.status == 0, done.out + done.err
    assert done.plan == "plan: sft -> align"
    (made,) = set((folder / "outputs" / stage).glob("*")) - before
    rows = list(csv.DictReader((made / "metrics.csv").open()))
    assert [row["zero_spread"] != "" for row in rows][:2] == [True, True]
    assert ("calls" in rows[0]) == ("sampler@align.sampler=tools" in words)
    assert 0 <= json.loads((made / "summary.json").read_text())["metrics"]["val/score"] <= 1
    only(folder / "outputs", "sft")  # trained once, read by all


@pytest.mark.parametrize(
    "words, said",
    [
        (["align.sampler.samples=1"], "type align.sampler.samples=8"),
        (["data@align.data=prompts"], "have no reference answer"),
        (["objective@align.objective=ppo"], "stage=grpo does not take objective@align.objective=ppo"),
        (["align.objective.beta=-1"], "align.objective.beta=-1"),
        (["align.objective.scale=mean"], "align.objective.scale"),
        (["align.reward.pattern=x"], "reward.pattern=x"),
        (
            ["sampler@align.sampler=tools", "align.sampler.max_calls=20"],
            " or align.sampler.max_calls or align.sampler.max_result_tokens",
        ),
    ],
    ids=["one sample", "no reference", "objective", "beta", "scale", "pattern", "context"],
)
def test_invalid_settings_are_reported_in_one_line(rlhf: Rlhf, folder: Path, words: list[str], said: str):
    done = rlhf(folder, *SMALL, *words)
    assert done.status == 2 and said in done.err + done.out, done.out + done.err
    assert "Traceback" not in done.err
