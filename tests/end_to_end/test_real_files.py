"""Every real file with the one override that names it: its stage trains on it and reports what it read."""

import csv
import math
from pathlib import Path

import pytest

from tests.end_to_end.commands import Command, only
from tests.end_to_end.conftest import MODEL
from tests.end_to_end.test_real_data import path_of

SMALL = [
    *MODEL,
    "model.vocab_size=512",
    "model.architecture.max_position_embeddings=4096",
    "+trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "stage.batch_size=4",
]
CASES = {
    "c4_demo.jsonl": ("pretrain", "c4", ["stage.context=128"], "300 read"),
    "wiki_demo.txt": ("pretrain", "wiki", ["stage.context=128"], "30 read"),
    "tinyshakespeare.txt": ("pretrain", "shakespeare", ["stage.context=128", "data.streaming=true"], "7222 read"),
    "tool_use_demo_50.jsonl": ("sft", "messages", [], "50 read"),
    "gsm8k_train_1000.jsonl": ("sft", "gsm8k", ["data.record=demonstration"], "1000 read"),
}


@pytest.mark.parametrize("file", CASES)
def test_the_stage_trains_on_the_file(tmp_path: Path, _server: None, file: str) -> None:
    stage, option, more, read = CASES[file]
    done = Command(tmp_path, [f"stage={stage}", f"data={option}", path_of(file), *SMALL, *more]).wait()
    assert done.status == 0, done.err
    assert read in done.out and " truncated, " in done.out and " dropped as too long" in done.out
    rows = list(csv.DictReader((only(tmp_path / "outputs", stage) / "metrics.csv").open()))
    loss = [float(row["loss"]) for row in rows if row["loss"]]
    assert len(loss) == 2 and all(
        abs(value - math.log(512)) < 0.5 for value in loss
    )  # the accuracy of an untrained model is that of a guess


def test_kto_and_grpo_train_on_real_files_from_one_policy(tmp_path: Path, _server: None) -> None:
    """KTO and GRPO start from a policy that a few updates of SFT train."""
    labels, problems = path_of("kto_en_demo.json"), path_of("gsm8k_train_1000.jsonl")
    demonstrations = ["stage=sft", "data.size=32", "stage.epochs=1", *SMALL]
    assert Command(tmp_path, demonstrations).wait().status == 0
    policy = f"inputs.policy={only(tmp_path / 'outputs', 'sft')}"
    small = [word for word in SMALL if not word.startswith("model.")]
    done = Command(tmp_path, ["stage=kto", "data=kto_demo", labels, policy, "data.max_length=2048", *small]).wait()
    assert done.status == 0 and "150 read" in done.out, done.err
    words = ["data.max_length=1024", "data.size=16", "data.validation=4", "objective.gamma=0"]
    rollout = ["reward=exact_match", "sampler.max_new_tokens=4", "sampler.samples=2", "stage.steps=1"]
    done = Command(tmp_path, ["stage=grpo", "data=gsm8k", problems, policy, *words, *rollout, *small]).wait()
    assert done.status == 0, done.err
    (row,) = csv.DictReader((only(tmp_path / "outputs", "grpo") / "metrics.csv").open())
    assert 0 <= float(row["score"]) <= 1


def test_bad_input_ends_with_one_line_and_status_2(tmp_path: Path, _server: None) -> None:
    (tmp_path / "half.jsonl").write_text('{"prompt": "q", "completion": "a"}\nplain words\n' * 20)
    (tmp_path / "cut.jsonl.gz").write_bytes(b"\x1f\x8b\x08\0 and no more")
    for words, said in (
        (["data.source=half.jsonl"], "7 of 15 rows are unusable"),
        (["data.source=./cut.jsonl.gz"], "is a broken gz file"),
        (["data=gsm8k", "data.source=half.jsonl", "data.max_bad=1", "data.validation=0"], "stage=sft"),
        (["model.chat_template=chatlm"], "is neither the name of a template nor a Jinja file (did you mean chatml?)"),
        (["adapter=lora", "adapter.modules=[c_attn]"], "adapter.modules=c_attn: the model has no such linear layer"),
    ):
        done = Command(tmp_path, ["stage=sft", "data.size=8", *MODEL, *words]).wait()
        lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert done.status == 2 and len(lines) == 1 and said in lines[0], (words, done.status, done.err)
        assert "Traceback" not in done.err
