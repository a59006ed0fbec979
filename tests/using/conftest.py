"""Finished runs built by hand: a tiny model saved as a run saves it, with its config and lineage."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from rlhf.cli import main
from rlhf.data.collate import TokenBatch, collate
from rlhf.data.encoding import encode_dialogue
from rlhf.data.records import Message
from rlhf.models.adapters import DoRA, LoRA, QLoRA
from rlhf.models.language_model import LanguageModel
from rlhf.models.scalar import ScalarModel
from rlhf.runs.run_directory import Run
from rlhf.testing import tiny_model
from tests.models.conftest import FP32, move_adapter, spec

ADAPTERS = {"lora": LoRA(rank=4), "qlora": QLoRA(rank=4), "dora": DoRA(rank=4)}


LESSON = {
    "Hello": "Good day to you.",
    "Who?": "Anna.",
    "What is two plus two?": "Two plus two is four, of course.",
    "And now?": "Nothing more. Good bye.",
}


def untrained() -> LanguageModel:
    """Build a model with random weights, spread widely enough that likely tokens have clear probabilities."""
    model = tiny_model((*LESSON, *LESSON.values()))
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(4.0 if value.ndim > 1 else 1.0)
    return model


def policy(steps: int = 35) -> LanguageModel:
    """Train a policy on four responses until it writes text and ends, without being certain of either."""
    model = tiny_model((*LESSON, *LESSON.values()))
    rows = [
        encode_dialogue(model.tokenizer, (Message("user", question), Message("assistant", answer)))
        for question, answer in LESSON.items()
    ]
    batch = collate(rows, model.pad_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        logp, _ = model.logprobs(TokenBatch.of(batch.ids, batch.attention_mask, batch.loss_mask, batch.position_ids))
        loss = -logp.sum() / batch.loss_mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def finished(folder: Path, model: LanguageModel | ScalarModel, path: str | None, *parents: Path, **config: Any) -> Path:
    """Write a run directory around a model, as a finished run leaves it.

    Args:
        folder: OUTPUTS/STAGE/FINGERPRINT.
        path: ``model.path`` of its config.
        parents: Run directories it read.
        config: More of its config.
    """
    model.save(folder / "model")
    runs = [Run(parent) for parent in parents]
    ancestors: dict[str, Any] = {}
    for run in runs:
        own = {key: run.lineage.get(key) for key in ("stage", "folder", "inputs", "parents")}
        ancestors |= run.lineage.get("ancestors", {}) | {run.fingerprint: own}
    lineage = {
        "fingerprint": folder.name,
        "stage": folder.parent.name,
        "folder": str(folder),
        "inputs": {"policy": [run.fingerprint for run in runs]} if runs else {},
        "parents": [run.fingerprint for run in runs],
        "ancestors": ancestors,
    }
    whole = {"inputs": {"reference": None}, "model": {"path": path}, "seed": 0, **config}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(whole)))
    (folder / "lineage.json").write_text(json.dumps(lineage))
    (folder / "summary.json").write_text(json.dumps({"metrics": {"val/loss": 1.25}, "wall_s": 2.0}))
    command = f"rlhf stage={folder.parent.name} optimizer.lr=1e-4"
    (folder / "status.json").write_text(json.dumps({"status": "finished", "command": command}))
    return folder


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return outputs/ with a pretrained model, SFT runs of all adapters on it, and a reward model."""
    outputs = tmp_path_factory.mktemp("using") / "outputs"
    data = {"_target_": "rlhf.data.Data", "record": "text", "source": "testbed", "size": 64}
    data["testbed"] = {"_target_": "rlhf.data.testbed.Testbed", "seed": 3, "people": 5}
    base = finished(outputs / "pretrain" / "a0", untrained(), None, data=data)
    for name, adapter in ADAPTERS.items():
        model = spec(base / "model").load(adapter, FP32)
        move_adapter(model)
        hyperparameters = {"adapter": {"rank": 4}, "data": {"record": "demonstration", "source": "mine.jsonl"}}
        finished(outputs / "sft" / f"{name}0", model, str(base / "model"), base, **hyperparameters)
    finished(outputs / "sft" / "none0", policy(), str(base / "model"), base)
    reward = ScalarModel.load(str(base / "model"))
    reward.calibrate(torch.tensor([3.0, 5.0, 9.0]))
    finished(outputs / "reward_model" / "b0", reward, str(base / "model"), base)
    return outputs


@pytest.fixture
def rlhf(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run ``rlhf WORDS --outputs OUTPUTS`` in an empty directory; return its status and its output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def typed(*words: object) -> tuple[int, str]:
        status = main.run([*map(str, words), "--outputs", str(outputs)])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return typed
