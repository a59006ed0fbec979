"""DPO family and RLAIF as they are typed."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.commands import Command, Done, only
from tests.end_to_end.conftest import COMPARE, MODEL, POLICIES
from tests.end_to_end.test_real_data import path_of

Rlhf = Callable[..., Done]
BASE = [word for word in POLICIES if not word.startswith("collect.")]
ROUNDS = [
    f"{step}.{rest}"
    for step, words in {
        "collect_1": ["data.size=32", "sampler.max_new_tokens=8"],
        "collect_2": ["data.size=32", "sampler.max_new_tokens=8"],
        "align_1": ["stage.batch_size=8"],
        "align_2": ["stage.batch_size=8"],
    }.items()
    for rest in words
]
SMALL = ["data.size=32", "data.validation=8", "stage.batch_size=8", *MODEL]


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metrics.csv").open()))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory, _server: None) -> Path:
    """Return a directory with two rounds of DPO in it."""
    folder = tmp_path_factory.mktemp("house")
    done = Command(folder, ["pipeline=iterative_dpo", *MODEL, *BASE, *ROUNDS, *COMPARE]).wait()
    assert done.status == 0, done.out + done.err
    assert "plan: pretrain -> sft -> collect_1 -> align_1 -> collect_2 -> align_2;" in done.plan
    return folder


def policy(workdir: Path) -> str:
    return f"inputs.policy={only(workdir / 'outputs', 'sft')}"


def test_each_round_starts_at_log_two_from_the_newest_policy(workdir: Path) -> None:
    runs = list((workdir / "outputs" / "dpo").iterdir())
    assert len(runs) == 2
    for run in runs:
        assert float(rows(run)[0]["loss"]) == pytest.approx(math.log(2), abs=1e-5)
    starts = [json.loads((run / "lineage.json").read_text())["ancestors"] for run in runs]
    assert sorted(sum(x["stage"] == "dpo" for x in ancestors.values()) for ancestors in starts) == [0, 1]


def test_collect_reports_its_agreement_with_gold(workdir: Path) -> None:
    for run in (workdir / "outputs" / "collect").iterdir():
        metrics = json.loads((run / "summary.json").read_text())["metrics"]
        # The responses of a model after a few updates may all be equally bad: then agreement is undefined.
        assert metrics.get("agreement", 1.0) > 0.5


@pytest.mark.parametrize("words", [["stage=kto"], ["stage=dpo", "objective=kto", "data=labels"]], ids=" ".join)
def test_kto_trains_on_labels(workdir: Path, rlhf: Rlhf, words: list[str]) -> None:
    done = rlhf(workdir, *words, policy(workdir), *SMALL)
    assert done.status == 0, done.out + done.err
    newest = max((workdir / "outputs" / words[0].removeprefix("stage=")).iterdir(), key=lambda p: p.stat().st_mtime)
    assert float(rows(newest)[0]["loss"]) == pytest.approx(0.5, abs=1e-5)


def test_kto_trains_on_a_file_of_labels(workdir: Path, rlhf: Rlhf, tmp_path: Path) -> None:
    file = tmp_path / "labels.json"
    turns = [("Hi?", "Hello.", True), ("Hi?", "No.", False), ("Who?", "Me.", True), ("Who?", "Go.", False)] * 3
    content = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}], "label": good}
        for q, a, good in turns
    ]
    file.write_text(json.dumps(content))
    words = ["stage=dpo", "objective=kto", "data=kto_demo", f"data.source={file}", "stage.batch_size=4"]
    done = rlhf(workdir, *words, policy(workdir), "data.validation=0")
    assert done.status == 0, done.out + done.err


def test_kto_trains_on_the_demonstration_file(workdir: Path, rlhf: Rlhf) -> None:
    """The longest of its dialogues do not fit the tiny model, which is reported, with what to type."""
    words = ["stage=kto", "data=kto_demo", path_of("kto_en_demo.json"), "stage.batch_size=4"]
    done = rlhf(workdir, *words, policy(workdir))
    assert done.status == 2 and "type data.max_length=128" in done.err, done.out + done.err


@pytest.mark.parametrize("objective", ["relative", "reward_aware", "orpo"])
def test_a_loss_is_swapped_by_one_override(workdir: Path, rlhf: Rlhf, objective: str) -> None:
    done = rlhf(workdir, "stage=dpo", f"objective={objective}", policy(workdir), "stage.micro_batch_size=4", *SMALL)
    assert done.status == 0, done.out + done.err


def test_another_reference_is_used(workdir: Path, rlhf: Rlhf) -> None:
    other = only(workdir / "outputs", "pretrain")
    done = rlhf(workdir, "stage=dpo", policy(workdir), f"inputs.reference={other}", *SMALL)
    assert done.status == 0, done.out + done.err
    # Some of the other runs here have no reference, hence no gap.
    gaps = [float(rows(run)[0].get("reference_gap", 0)) for run in (workdir / "outputs" / "dpo").iterdir()]
    assert max(gaps) > 0.1
    refused = rlhf(workdir, "stage=dpo", "objective=simpo", policy(workdir), f"inputs.reference={other}", *SMALL)
    assert refused.status == 2 and "this objective has no reference" in refused.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stage=dpo", "data=labels"], "the data holds labels; type data=comparisons or objective=kto"),
        (["stage=dpo", "objective=relative", "stage.batch_size=1"], "type stage.batch_size=2 or more"),
        (["stage=collect", "annotator=judge"], "type inputs.judge=RUN"),
        (["stage=collect", "annotator=judge", "inputs.judge=some/model", "annotator.template=x"], "no such template"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_reported_in_one_line(workdir: Path, rlhf: Rlhf, words: list[str], says: str) -> None:
    done = rlhf(workdir, *words, policy(workdir))
    assert done.status == 2 and says in done.err, done.out + done.err
    assert "Traceback" not in done.err and len(done.err.splitlines()) == 1


def test_rlaif_runs_with_a_trained_judge(workdir: Path, rlhf: Rlhf) -> None:
    """The judge of a few updates is refused as untrained; with the check relaxed, it works like any other."""
    words = [
        "pipeline=rlaif",
        *MODEL,
        *BASE,
        "judge.data.comparisons.size=32",
        "judge.stage.batch_size=16",
        "judge.stage.epochs=1",
        "collect.data.size=32",
        "collect.sampler.max_new_tokens=8",
        "collect.sampler.samples=2",
        "align.stage.batch_size=4",
        *COMPARE,
    ]
    refused = rlhf(workdir, *words, "collect.annotator.least_mass=0.9")
    assert refused.status == 2 and "answers are neither A nor B" in refused.err, refused.out + refused.err
    done = rlhf(workdir, *words, "collect.annotator.least_mass=0", "until=collect")
    assert done.status == 0, done.out + done.err
    judged = [
        metrics
        for run in (workdir / "outputs" / "collect").iterdir()
        if (run / "summary.json").exists()
        and "judge/pairs" in (metrics := json.loads((run / "summary.json").read_text())["metrics"])
    ]
    assert len(judged) == 1 and {"judge/ties", "judge/position_bias", "judge/unreadable"} <= judged[0].keys()
    assert list((workdir / "outputs" / "judge").glob("*.jsonl"))
