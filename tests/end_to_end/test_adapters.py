"""Adapters and number formats from the command line, on a model of 40 thousand weights."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rlhf.testing import tiny_model
from tests.end_to_end.commands import Done, runs, status

SMALL = ["data.size=8", "data.validation=4", "stage.batch_size=8", "stage.epochs=1"]


@pytest.mark.slow
def test_a_sweep_over_adapters_and_formats(tmp_path: Path, rlhf: Callable[..., Done]) -> None:
    tiny_model(("Where does Amy live?", "Amy lives in Bath.")).save(tmp_path / "tiny" / "model")
    words = ["stage=sft", "model.path=tiny/model", *SMALL, "adapter=lora,qlora", "precision=fp32,bf16"]
    words += ["adapter.rank=2"]  # a hyperparameter that the default, adapter=none, does not have
    # Hydra's own launcher runs its jobs in this process: four interpreters would import torch for most of a minute.
    done = rlhf(tmp_path, *words, "hydra/launcher=basic", "-m")
    assert done.status == 0, done.out + done.err
    found = runs(tmp_path / "outputs")
    assert len(found) == 4 and all(status(folder)["status"] == "finished" for folder in found)
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in found]
    chosen = [(config["adapter"]["_target_"].rpartition(".")[2], config["precision"]["trainer"]) for config in configs]
    every = [(adapter, precision) for adapter in ("LoRA", "QLoRA") for precision in ("32-true", "bf16-mixed")]
    assert sorted(chosen) == sorted(every)
    losses = {json.loads((folder / "summary.json").read_text())["metrics"]["val/loss"] for folder in found}
    assert len(losses) == 4  # 4 bits and bfloat16 both round, each differently
    report = rlhf(tmp_path, "report", "outputs")
    assert report.status == 0, report.out + report.err
    table = [line.split() for line in report.out.splitlines()]
    named = {tuple(line[1:3]) for line in table if line and line[0].startswith("sft/")}
    assert named == {(adapter, format) for adapter in ("LoRA", "QLoRA") for format in ("32-true", "bf16-mixed")}
