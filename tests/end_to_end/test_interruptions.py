"""A command that was killed, stopped, or started twice ends with the same weights when it is typed again."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.end_to_end.commands import Command, Done, first, only, status
from tests.end_to_end.conftest import MODEL

SFT = [
    "stage=sft",
    *MODEL,
    "data.size=48",
    "data.validation=8",
    "stage.batch_size=16",
    "stage.epochs=5",
    "callbacks.checkpoints.every_n_batches=1",
]
PPO = [
    "stage=ppo",
    "recipe=testbed",
    "data.size=32",
    "data.validation=8",
    "sampler.max_new_tokens=8",
    "stage.steps=8",
    "stage.batch_size=8",
    "stage.minibatches=2",
    "stage.epochs=1",
    "callbacks.checkpoints.every_n_batches=1",
]

Start = Callable[..., Command]
Rlhf = Callable[..., Done]


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory, _server: None) -> Path:
    """Return the run directory of an uninterrupted SFT run."""
    folder = tmp_path_factory.mktemp("whole")
    done = Command(folder, SFT).wait()
    assert done.status == 0, done.err
    return only(folder / "outputs", "sft")


def checkpoint(outputs: Path, stage: str, step: int) -> Callable[[], bool]:
    """Return whether a checkpoint of that step or a later one exists."""
    return lambda: any(
        int(p.stem.partition("=")[2]) >= step for p in outputs.glob(f"{stage}/*/checkpoints/step=*.ckpt")
    )


def same_run(a: Path, b: Path) -> None:
    """Assert that both runs ended with the same bits and logged the same numbers."""
    assert a.name == b.name
    assert (a / "model/model.safetensors").read_bytes() == (b / "model/model.safetensors").read_bytes()
    assert (a / "metrics.csv").read_text() == (b / "metrics.csv").read_text()


@pytest.mark.parametrize(("step", "torn"), [(3, False), (14, True)], ids=["whole", "torn"])
def test_a_killed_run_resumes_from_its_last_checkpoint(
    tmp_path: Path, start: Start, rlhf: Rlhf, sft: Path, step: int, torn: bool
):
    killed = start(tmp_path, *SFT, "callbacks.checkpoints.keep=2")
    killed.until(checkpoint(tmp_path / "outputs", "sft", step))
    killed.signal(signal.SIGKILL)
    assert killed.wait().status == -signal.SIGKILL
    folder = only(tmp_path / "outputs", "sft")
    assert status(folder)["status"] == "running" and not (folder / "model").exists()
    newest = sorted(folder.glob("checkpoints/step=*.ckpt"))[-1]
    if torn:
        os.truncate(newest, newest.stat().st_size - 1000)

    again = rlhf(tmp_path, *SFT)
    assert again.status == 0, again.err
    assert "resumes (was killed)" in again.out and (f"{newest.name}: is cut off" in again.out) == torn
    same_run(folder, sft)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["attempts"] == 2
    assert summary["value"] == json.loads((sft / "summary.json").read_text())["value"]


def test_a_killed_ppo_run_resumes_from_its_last_checkpoint(
    pipeline: Done, workdir: Path, tmp_path: Path, start: Start, rlhf: Rlhf
):
    inputs = [
        f"inputs.{role}={first(workdir / 'outputs', run)}" for role, run in (("policy", "sft"), ("reward_model",) * 2)
    ]
    whole = rlhf(tmp_path / "whole", *PPO, *inputs)
    assert whole.status == 0, whole.err

    killed = start(tmp_path, *PPO, *inputs)
    killed.until(checkpoint(tmp_path / "outputs", "ppo", 3))
    killed.signal(signal.SIGKILL)
    assert killed.wait().status == -signal.SIGKILL
    again = rlhf(tmp_path, *PPO, *inputs)
    assert again.status == 0, again.err
    assert "resumes (was killed)" in again.out
    same_run(only(tmp_path / "outputs", "ppo"), only(tmp_path / "whole/outputs", "ppo"))


def test_a_stopped_run_reports_that_it_can_be_resumed(tmp_path: Path, start: Start, rlhf: Rlhf, sft: Path):
    stopped = start(tmp_path, *SFT)
    stopped.until(checkpoint(tmp_path / "outputs", "sft", 2))
    stopped.signal(signal.SIGTERM)
    done = stopped.wait()
    assert done.status == 75, done.err
    assert "type the same command again to continue" in done.out
    folder = only(tmp_path / "outputs", "sft")
    assert status(folder)["status"] == "stopped" and not (folder / "model").exists()

    again = rlhf(tmp_path, *SFT)
    assert again.status == 0, again.err
    assert "resumes (was stopped)" in again.out
    same_run(folder, sft)


@pytest.mark.parametrize(("number", "ended"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75)], ids=["killed", "stopped"])
def test_a_collection_keeps_its_finished_batches(
    pipeline: Done, workdir: Path, tmp_path: Path, start: Start, rlhf: Rlhf, number: signal.Signals, ended: int
):
    policy = f"inputs.policy={only(workdir / 'outputs', 'sft')}"
    words = ["stage=collect", "recipe=testbed", policy, "data.size=64", "sampler.max_new_tokens=8"]
    words += ["stage.batch_size=2"]
    outputs = tmp_path / "outputs"

    def finished() -> list[str]:
        return [line for part in outputs.glob("collect/*/*.part0.jsonl") for line in part.read_text().split("\n")[:-1]]

    begun = start(tmp_path, *words)
    begun.until(lambda: len(finished()) >= 2)
    begun.signal(number)
    assert begun.wait().status == ended
    kept = finished()
    # Marks a finished batch, to see whether it is computed again.
    (part,) = outputs.glob("collect/*/*.part0.jsonl")
    part.write_text(part.read_text().replace('"prompts": 2', '"prompts": 1002', 1))

    again = rlhf(tmp_path, *words)
    assert again.status == 0, again.err
    folder = only(outputs, "collect")
    assert json.loads((folder / "summary.json").read_text())["metrics"]["prompts"] == 1064
    first = [json.dumps(comparison) for comparison in json.loads(kept[0])["comparisons"]]
    assert (folder / "comparisons.jsonl").read_text().splitlines()[: len(first)] == first
    assert not list(folder.glob("*.part*"))


def test_a_rejection_sampling_run_killed_during_sampling_keeps_its_responses(
    pipeline: Done, workdir: Path, tmp_path: Path, start: Start, rlhf: Rlhf
):
    policy = f"inputs.policy={first(workdir / 'outputs', 'sft')}"
    words = ["stage=rejection_sampling", policy, "reward=gold", "data.size=64", "data.validation=8"]
    words += ["recipe=testbed", "sampler.max_new_tokens=8", "stage.batch_size=2", "stage.epochs=1"]
    whole = rlhf(tmp_path / "whole", *words)
    assert whole.status == 0, whole.err

    killed = start(tmp_path, *words)
    killed.until(
        lambda: [p for p in tmp_path.glob("outputs/*/*/responses.part0.jsonl") if p.read_text().count("\n") > 2]
    )
    killed.signal(signal.SIGKILL)
    assert killed.wait().status == -signal.SIGKILL
    folder = only(tmp_path / "outputs", "rejection_sampling")
    assert not (folder / "selected_responses.jsonl").exists()
    part = folder / "responses.part0.jsonl"
    assert part.read_text().count("\n") > 2

    again = rlhf(tmp_path, *words)
    assert again.status == 0, again.err
    expected = only(tmp_path / "whole" / "outputs", "rejection_sampling")
    assert (folder / "selected_responses.jsonl").read_bytes() == (expected / "selected_responses.jsonl").read_bytes()
    same_run(folder, expected)
    assert not part.exists()


def test_the_second_of_two_equal_commands_waits_for_the_first(tmp_path: Path, start: Start, sft: Path):
    first = start(tmp_path, *SFT)
    first.until(checkpoint(tmp_path / "outputs", "sft", 1))
    first.signal(signal.SIGSTOP)
    second = start(tmp_path, *SFT)
    second.until(lambda: "waits for process" in second.out)
    first.signal(signal.SIGCONT)
    one, two = first.wait(), second.wait()
    assert (one.status, two.status) == (0, 0), one.err + two.err
    assert "starts" in one.out and "starts" not in two.out and "resumes" not in two.out
    assert f"waits for process {first.process.pid}" in two.out and "computed meanwhile" in two.out
    same_run(only(tmp_path / "outputs", "sft"), sft)


@pytest.mark.slow
def test_two_ranks_train_the_same_weights_as_one(tmp_path: Path, start: Start, sft: Path):
    # Two interpreters, each of which imports torch.
    done = start(tmp_path, *SFT, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2").wait(patience=280)
    assert done.status == 0, done.out + done.err
    folder = only(tmp_path / "outputs", "sft")
    assert folder.name != sft.name
    one, two = (load_file(x / "model/model.safetensors") for x in (sft, folder))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(two[name], one[name], atol=2e-4, err_msg=name)
