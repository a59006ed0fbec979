"""Adapters and number formats from the command line, on a model of 40 thousand weights."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.testing import tiny_model
from tests.end_to_end.commands import Command, Done, runs, status

SMALL = ["data.size=8", "data.validation=4", "stage.batch_size=8", "stage.epochs=1"]


@pytest.mark.slow
def test_a_sweep_over_adapters_and_formats(tmp_path: Path, rlhf: Callable[..., Done]) -> None:
    tiny_model(("Where does Amy live?", "Amy lives in Bath.")).save(tmp_path / "tiny" / "model")
    jobs = f"hydra.launcher.n_jobs={min(2, os.cpu_count() or 1)}"
    words = ["stage=sft", "model.path=tiny/model", *SMALL, "adapter=lora,qlora", "precision=fp32,bf16"]
    words += ["adapter.rank=2", jobs, "-m"]  # a knob that the default, adapter=none, has not
    done = Command(tmp_path, words).wait(patience=280)  # four interpreters, each of which imports torch
    assert done.status == 0, done.out + done.err
    assert "4 of 4 jobs finished" in done.out
    found = runs(tmp_path / "outputs")
    assert len(found) == 4 and all(status(folder)["status"] == "finished" for folder in found)
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    rows = list(csv.DictReader((sweep / "results.csv").open()))
    every = [(adapter, precision) for adapter in ("lora", "qlora") for precision in ("fp32", "bf16")]
    assert sorted((row["adapter"], row["precision"]) for row in rows) == sorted(every)
    losses = {json.loads((folder / "summary.json").read_text())["metrics"]["val/loss"] for folder in found}
    assert len(losses) == 4  # 4 bits and bfloat16 both round, each in its way
    report = rlhf(tmp_path, "report")
    assert report.status == 0, report.out + report.err
    table = [line.split() for line in report.out.splitlines()]
    named = {tuple(line[1:3]) for line in table if line and line[0].startswith("sft/")}
    assert named == {(adapter, format) for adapter in ("LoRA", "QLoRA") for format in ("32-true", "bf16-mixed")}
