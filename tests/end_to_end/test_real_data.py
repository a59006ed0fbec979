"""Public data: a tokenizer trained on the file, a small random model, a few updates on a few records."""

import csv
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.commands import ROOT, Command, Done, only
from tests.end_to_end.conftest import MODEL

DATA = ROOT.parent / "shared/data"
# The same few records repeatedly: the loss must fall whatever they are.
SMALL = [
    *MODEL,
    "model.vocab_size=512",
    "model.architecture.max_position_embeddings=1024",
    "data.max_length=512",
    "data.validation=4",
    "optimizer.lr=3e-3",
]

Rlhf = Callable[..., Done]


def path_of(name: str) -> str:
    """Return the override that names the file; skip the test where it is missing."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return f"data.source={path}"


def losses(folder: Path, column: str = "loss") -> list[float]:
    """Return a column of metrics.csv."""
    return [float(row[column]) for row in csv.DictReader((folder / "metrics.csv").open()) if row[column]]


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory: pytest.TempPathFactory, _server: None) -> tuple[Done, Path]:
    """Run SFT on instructions; return its run directory."""
    source = path_of("alpaca_en_demo.json")
    folder = tmp_path_factory.mktemp("alpaca")
    words = ["stage=sft", "data=alpaca", source, "data.size=68", "stage.batch_size=16", "stage.epochs=4", *SMALL]
    done = Command(folder, words).wait()
    assert done.status == 0, done.err
    return done, only(folder / "outputs", "sft")


def test_sft_trains_on_instructions(alpaca: tuple[Done, Path]):
    done, folder = alpaca
    loss = losses(folder)
    # An untrained model guesses among 512 tokens: log 512 = 6.2 nats.
    assert abs(loss[0] - math.log(512)) < 0.5
    assert loss[-1] < loss[0] - 0.3
    assert "68 read, 64 to train on, 4 held out" in done.out


@pytest.mark.parametrize("option, name", [("hh_harmless", "hh_harmless.jsonl.gz"), ("graded_preferences",) * 2])
def test_a_reward_model_trains_on_preferences(tmp_path: Path, rlhf: Rlhf, option: str, name: str):
    source = path_of(name if "." in name else f"{name}.jsonl")
    words = ["data.size=24", "stage.batch_size=8", "stage.epochs=8"]
    done = rlhf(tmp_path, "stage=reward_model", f"data={option}", source, *SMALL, *words)
    assert done.status == 0, done.err
    folder = only(tmp_path / "outputs", "reward_model")
    loss = losses(folder)
    assert len(loss) >= 8 and sum(loss[-3:]) < sum(loss[:3]) - 0.1
    if option == "graded_preferences":
        header = (folder / "metrics.csv").read_text().partition("\n")[0].split(",")
        grades = {name.removeprefix("val/accuracy/") for name in header if name.startswith("val/accuracy/")}
        assert grades and grades <= {"negligible", "slightly", "better", "significantly"}


def test_dpo_trains_on_dialogues(tmp_path: Path, rlhf: Rlhf, alpaca: tuple[Done, Path]):
    source = path_of("dpo_en_demo.json")
    small = [word for word in SMALL if not word.startswith(("model.", "data.max_length"))]  # the dialogues are long
    words = [f"inputs.policy={alpaca[1]}", "data.size=24", "stage.batch_size=4", "stage.epochs=4"]
    done = rlhf(tmp_path, "stage=dpo", "data=dpo_demo", source, *small, *words)
    assert done.status == 0, done.err
    loss = losses(only(tmp_path / "outputs", "dpo"))
    assert loss[0] == pytest.approx(math.log(2), abs=1e-4)  # policy and reference are still equal
    assert sum(loss[-3:]) / 3 < loss[0] - 0.02
