"""Errors that the user can fix: exit status 2, one line per finding with what to type, and no finished run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.commands import Done, runs, shell, status
from tests.end_to_end.conftest import MODEL

PRETRAINED = "inputs.policy=some/model"  # names weights of the hub, which are not read before the config is valid

FILES = {
    "broken.json": '[{"instruction": "a", "input": "", "output": "b"}, {"instruction":',
    "rows.jsonl": '{"instruction": "a", "output": "b"}\n{"instruction": 3, "output": "b"}\n{"colour": "red"}\n',
    "binary.jsonl": "\x00\x01\x02\n",
    "empty.jsonl": "",
}

TABLE = [
    (f"stage=dpo {PRETRAINED} objective.betta=1", ["objective.betta", "did you mean objective.beta?"]),
    (f"stage=dpo {PRETRAINED} objective.beta=abc", ["objective.beta=abc", "number"]),
    (f"stage=dpo {PRETRAINED} objective.beta=-1", ["objective.beta=-1", "greater than 0"]),
    (f"stage=dpo {PRETRAINED} objective=ipoo", ["objective=ipoo", "did you mean ipo?"]),
    ("stage=dpoo", ["stage=dpoo", "did you mean dpo?"]),
    ("pipeline=instruct_gpt", ["pipeline=instruct_gpt", "did you mean instructgpt?"]),
    ("dpo", ["stage=dpo"]),
    ("stage=sft objective=dpo", ["stage=sft does not take objective=dpo", "cross_entropy"]),
    ("stage=sft data.source=/no/such/file", ["data.source=/no/such/file", "no such file"]),
    ("stage=sft data=alpaca data.source=broken.json", ["broken.json"]),
    ("stage=sft data=alpaca data.source=rows.jsonl", ["rows.jsonl, row 2", "instruction", "data.max_bad"]),
    ("stage=sft data=alpaca data.source=binary.jsonl", ["binary.jsonl"]),
    ("stage=sft data=alpaca data.source=empty.jsonl", ["empty.jsonl"]),
    ("stage=sft data.size=8 stage.batch_size=64", ["stage.batch_size=64", "8"]),
    ("stage=ppo", ["inputs.policy", "type inputs.policy=RUN", "type inputs.reward_model=RUN"]),
    ("stage=ppo inputs.policy=nonsense reward=gold", ["inputs.policy=nonsense", "rlhf runs list"]),
    ("stage=sft inputs.reward_model=some/model", ["inputs.reward_model", "no effect"]),
    ("stage=sft seed=abc optimizer.lr=-1", ["seed=abc", "optimizer.lr=-1"]),
    ("stage=sft objective.beta=1,2", ["objective.beta", "-m"]),
    ("pipeline=instructgpt align.objective.betta=1", ["align.objective.betta", "did you mean align.objective.beta?"]),
    ("pipeline=instructgpt objective.beta=1", ["type align.objective.beta=1"]),
    ("pipeline=instructgpt optimizer.lr=1", ["optimizer.lr=1: has no effect", "align.optimizer.lr"]),
    ("pipeline=instructgpt until=sftt", ["until=sftt", "did you mean until=sft?"]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory in which commands are typed, with some unreadable files."""
    path = tmp_path_factory.mktemp("errors")
    for name, content in FILES.items():
        (path / name).write_text(content)
    return path


@pytest.mark.parametrize(("line", "says"), TABLE, ids=[line for line, _ in TABLE])
def test_a_mistake_is_reported_in_one_line(folder: Path, rlhf: Callable[..., Done], line: str, says: list[str]):
    done = rlhf(folder, *line.split(), *(MODEL if "=" in line else ()))
    assert done.status == 2, done.out + done.err
    assert "Traceback" not in done.out + done.err
    lines = done.err.splitlines()
    assert lines and all(text.startswith(("error: ", "config error: ")) for text in lines), done.err
    for text in says:
        assert text in done.err
    assert all(status(run)["status"] == "failed" for run in runs(folder / "outputs"))


def test_an_empty_command_prints_how_to_begin(folder: Path):
    done = shell(folder)
    assert done.status == 2 and done.err.startswith("usage:") and "stage=" in done.err
