"""Reuse, resume, retry, locks, and the files that a run writes."""

import errno
import json
import multiprocessing
import os
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import DictConfig, OmegaConf

from rlhf.errors import RLHFError, RunFailed, UserError, key
from rlhf.running import pipeline, versions, worker
from rlhf.runs import fingerprint
from rlhf.runs.run_directory import Run, find
from rlhf.storage import checkpoint_files

Typed = Callable[..., DictConfig]


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def go(typed: Typed, *overrides: str) -> float | None:
    return pipeline.run(typed(*overrides), overrides)


def test_a_pipeline_runs_its_steps_in_order_and_once(typed: Typed, train, capsys) -> None:
    assert go(typed, "pipeline=instructgpt") == 0.25
    assert train.order == ["pretrain", "sft", "collect", "reward_model", "ppo"]
    assert go(typed, "pipeline=instructgpt") == 0.25
    assert len(train.calls) == 5
    assert capsys.readouterr().out.count("reused") >= 5


def test_a_run_made_with_another_torch_is_reused_with_a_word(typed: Typed, train, capsys, monkeypatch) -> None:
    go(typed, "pipeline=instructgpt", "until=sft")
    (recorded,) = {run["versions"]["torch"] for run in map(summary_of, train.folders.values())}
    monkeypatch.setattr(versions, "_version", lambda name: "99.0" if name == "torch" else metadata.version(name))
    capsys.readouterr()
    go(typed, "pipeline=instructgpt", "until=sft")
    assert len(train.calls) == 2
    assert capsys.readouterr().out.count(f"reused (made with torch {recorded}, now 99.0)") == 2


def test_a_command_typed_again_after_its_code_changed_starts_anew_and_why(
    typed: Typed, train, capsys, monkeypatch
) -> None:
    go(typed, "pipeline=instructgpt", "until=sft")
    first = set(train.folders.values())
    assert "a new run" not in capsys.readouterr().out
    monkeypatch.setattr(fingerprint, "source_digest", lambda names: "other code")
    go(typed, "pipeline=instructgpt", "until=sft")
    out = capsys.readouterr().out
    assert len(train.calls) == 4 and first.isdisjoint(train.folders.values())
    for folder in first:
        assert f"starts a new run: {folder}, which this command made before, was made with other code" in out


def test_only_the_swapped_step_is_trained(typed: Typed, train) -> None:
    go(typed, "pipeline=instructgpt")
    go(typed, "pipeline=instructgpt", "stage@align=dpo")
    go(typed, "pipeline=instructgpt", "stage@align=dpo", "objective@align.objective=ipo")
    assert train.order[5:] == ["dpo", "dpo"]


def test_a_single_stage_takes_runs_as_inputs(typed: Typed, train) -> None:
    go(typed, "pipeline=instructgpt", "until=reward_model")
    sft, reward = train.folders["sft"], train.folders["reward_model"]
    go(typed, "stage=ppo", f"inputs.policy={sft.name[:6]}", f"inputs.reward_model={str(reward)[:-4]}")
    assert train.configs["ppo"].model.path == str(sft / "model")
    assert train.configs["ppo"].reward.path == str(reward / "model")
    # It is the same run as that of the pipeline.
    go(typed, "pipeline=instructgpt")
    assert train.order.count("ppo") == 1


def test_files_of_a_run_directory(typed: Typed, train) -> None:
    go(typed, "pipeline=dpo")
    folder = train.folders["dpo"]
    content = json.loads((folder / "status.json").read_text())
    assert content["status"] == "finished" and content["attempt"] == 1 and content["pid"] == os.getpid()
    assert "${" not in (folder / "config.yaml").read_text()
    assert OmegaConf.load(folder / "config.yaml").model.path == str(train.folders["sft"] / "model")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["metrics"] == {"val/loss": 0.25, "reward": 1.5}
    assert summary["value"] == 0.25 and summary["tokens_per_s"] == 100.0 and summary["seed"] == 0
    assert summary["versions"]["hydra-core"] and summary["hardware"]["cpus"] and summary["wall_s"] > 0
    assert summary["peak_memory_bytes"]["cpu"] > 2**20
    lineage = json.loads((folder / "lineage.json").read_text())
    assert {a["stage"] for a in lineage["ancestors"].values()} == {"pretrain", "sft", "collect"}
    assert lineage["inputs"]["policy"] == [Run(train.folders["sft"]).fingerprint]
    assert not list(folder.glob(".*.json*"))


def test_a_failed_step_is_recorded_and_retried(typed: Typed, train) -> None:
    def fail(name: str, folder: Path) -> None:
        (folder / "half.txt").write_text("left over")
        raise ValueError("the loss became nan\nmore")

    train.then = fail
    with pytest.raises(
        RunFailed, match=r"^sft: failed with ValueError: the loss became nan \(traceback in outputs/sft"
    ):
        go(typed, "stage=sft")
    run = Run(train.folders["sft"])
    assert run.status == "failed" and "the loss became nan" in run.status_file["error"]
    assert "Traceback" in (run.folder / "error.txt").read_text()
    train.then = lambda name, folder: None
    go(typed, "stage=sft")
    assert run.finished and run.status_file["attempt"] == 2
    assert not (run.folder / "error.txt").exists() and not (run.folder / "half.txt").exists()
    assert train.calls == [("sft", False), ("sft", False)]


def test_a_user_error_in_a_step_stays_a_user_error(typed: Typed, train) -> None:
    def refuse(name: str, folder: Path) -> None:
        raise UserError("data.source: row 3 has no field text")

    train.then = refuse
    with pytest.raises(UserError, match="row 3"):
        go(typed, "stage=sft")
    assert Run(train.folders["sft"]).status == "failed"


def test_the_option_names_of_an_error_get_the_prefix_of_the_step(
    typed: Typed, train, tmp_path: Path, monkeypatch
) -> None:
    def refuse(name: str, folder: Path) -> None:
        if name == "ppo":
            fix = f"set {key('data.max_prompt_length', 4)} or a smaller {key('optimizer.lr')}"
            raise UserError("a prompt is too long", fix=fix)

    monkeypatch.setenv("RLHF_RESULT", str(tmp_path / "result.json"))
    train.then = refuse
    with pytest.raises(UserError) as error:
        go(typed, "pipeline=instructgpt")
    said = "align: a prompt is too long; set align.data.max_prompt_length=4 or a smaller align.optimizer.lr"
    assert str(error.value) == said
    assert json.loads((tmp_path / "result.json").read_text())["error"] == f"UserError: {said}"


def checkpoint(folder: Path, step: int) -> Path:
    """Write a file that passes as a whole checkpoint."""
    path = checkpoint_files.place(folder, step)
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("weights", b"1234" * 99)
    return path


@pytest.mark.parametrize("stop", [SystemExit(75), KeyboardInterrupt()])
def test_a_stopped_run_is_resumed_from_its_checkpoint(typed: Typed, train, stop: BaseException) -> None:
    def interrupt(name: str, folder: Path) -> None:
        checkpoint(folder, 4)
        raise stop

    train.then = interrupt
    with pytest.raises(type(stop)):
        go(typed, "stage=sft")
    run = Run(train.folders["sft"])
    assert run.status == "stopped"
    train.then = lambda name, folder: None
    go(typed, "stage=sft")
    assert train.calls[-1] == ("sft", True) and run.finished


def test_a_torn_checkpoint_is_skipped_and_without_a_whole_one_the_run_is_refused(typed: Typed, train, capsys) -> None:
    def interrupt(name: str, folder: Path) -> None:
        os.truncate(checkpoint(folder, 8), 100)
        checkpoint(folder, 4)
        raise SystemExit(75)

    train.then = interrupt
    with pytest.raises(SystemExit):
        go(typed, "stage=sft")
    folder = train.folders["sft"]
    os.truncate(checkpoint(folder, 4), 100)
    with pytest.raises(UserError, match=rf"step=00000008.ckpt: is cut off.*type `rlhf runs rm {folder}` and then"):
        go(typed, "stage=sft")
    assert Run(folder).status == "stopped" and len(train.calls) == 1
    checkpoint(folder, 4)
    train.then = lambda name, folder: None
    go(typed, "stage=sft")
    assert train.calls[-1] == ("sft", True) and Run(folder).finished
    assert "step=00000008.ckpt: is cut off" in capsys.readouterr().out
    assert [path.name for path in checkpoint_files.found(folder)] == ["step=00000004.ckpt"]


def test_a_killed_run_is_detected_and_run_again(typed: Typed, train) -> None:
    go(typed, "stage=sft")
    run = Run(train.folders["sft"])
    # As left by a process that was killed before the end: its files exist, its final status does not.
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join()
    run.write_status("running", pid=child.pid, host=os.uname().nodename)
    assert run.status == "killed"
    go(typed, "stage=sft")
    assert len(train.calls) == 2 and run.finished


def test_a_job_waits_for_another_that_computes_the_same(typed: Typed, train, capsys, monkeypatch) -> None:
    found = pipeline.plan(typed("stage=sft"))
    folder = found.steps[0].folder
    folder.mkdir(parents=True)
    ready, waiting = (multiprocessing.get_context("fork").Event() for _ in range(2))
    say = pipeline.console.say
    monkeypatch.setattr(
        pipeline.console, "say", lambda line, *style: (say(line, *style), "waits for" in line and waiting.set())
    )

    def other() -> None:
        run = Run(folder)
        with run.lock():
            run.begin(found.steps[0].config, {"fingerprint": found.steps[0].fingerprint}, "rlhf stage=sft")
            ready.set()
            assert waiting.wait(60)
            (folder / "summary.json").write_text('{"value": 7.0, "wall_s": 1}')
            run.write_status("finished")

    process = multiprocessing.get_context("fork").Process(target=other)
    process.start()
    assert ready.wait(20)
    assert go(typed, "stage=sft") == 7.0
    process.join()
    out = capsys.readouterr().out
    assert f"waits for process {process.pid}" in out and "computed meanwhile" in out
    assert train.calls == []


def test_a_finished_run_with_torn_results_is_computed_again(typed: Typed, train, capsys) -> None:
    go(typed, "stage=sft")
    sft = Run(train.folders["sft"])
    count, before = len(train.calls), sft.lineage
    for name in ("model/config.json", "summary.json"):
        path = sft.folder / name
        os.truncate(path, 1)
        assert sft.status == "damaged"
        go(typed, "stage=sft")
        assert sft.finished and train.calls[count:] == [("sft", False)]
        assert f"{path} has 1 bytes" in capsys.readouterr().out
        count += 1
    for name in ("lineage.json", "config.yaml"):  # what the command determines is written again, and nothing is trained
        whole = (sft.folder / name).read_bytes()
        (sft.folder / name).write_bytes(whole[:-9])
        go(typed, "stage=sft")
        assert sft.finished and (sft.folder / name).read_bytes() == whole and not sft.damage(thorough=True)
    assert len(train.calls) == count and sft.lineage == before


def test_torn_records_are_not_taken_for_whole(typed: Typed, train) -> None:
    go(typed, "pipeline=dpo", "until=collect")
    comparisons = train.folders["collect"] / "comparisons.jsonl"
    seen: list[bool] = []
    train.then = lambda name, folder: seen.append((folder / "comparisons.jsonl").exists())
    comparisons.write_text("{")
    go(typed, "pipeline=dpo", "until=collect")
    assert seen == [False] and Run(comparisons.parent).finished
    (comparisons.parent / "manifest.json").write_text("{")
    go(typed, "pipeline=dpo", "until=collect")
    assert seen == [False, False] and Run(comparisons.parent).finished


def test_a_pipeline_ends_with_a_comparison(typed: Typed, train, compared, capsys) -> None:
    go(typed, "pipeline=instructgpt", "compare.count=9", "seed=4")
    (call,) = compared.calls
    assert call["before"] == train.folders["sft"] / "model" and call["after"] == train.folders["ppo"] / "model"
    assert call["reward_model"] == train.folders["reward_model"] / "model"
    assert call["count"] == 9 and call["seed"] == 0  # its own seed, not that of training
    out = capsys.readouterr().out
    assert "align against sft, 9 held-out prompts" in out and "+0.20 ± 0.01" in out and "rlhf report" in out


def test_the_comparison_has_its_own_seed(typed: Typed, compared) -> None:
    go(typed, "pipeline=instructgpt", "compare.seed=5", "seed=4")
    assert compared.calls[0]["seed"] == 5


def test_a_comparison_without_a_reward_model(typed: Typed, compared) -> None:
    go(typed, "pipeline=instructgpt", "stage@align=dpo")
    assert compared.calls[0]["reward_model"] is None


def test_a_job_of_a_sweep_writes_its_result(typed: Typed, train, tmp_path: Path, monkeypatch) -> None:
    result = tmp_path / "job" / "result.json"
    monkeypatch.setenv("RLHF_RESULT", str(result))
    go(typed, "pipeline=instructgpt")
    content = json.loads(result.read_text())
    assert content["value"] == 0.25 and content["status"] == "finished"
    assert content["run"] == str(train.folders["ppo"])
    assert content["metrics"] == {"val/loss": 0.25, "reward": 1.5, "gold_difference": 0.2}


def test_a_failed_job_writes_its_error(typed: Typed, train, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RLHF_RESULT", str(tmp_path / "result.json"))
    train.then = lambda name, folder: 1 / 0
    with pytest.raises(RunFailed):
        go(typed, "stage=sft")
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["status"] == "failed" and "division by zero" in content["error"]
    assert content["run"] == str(train.folders["sft"])


def test_other_ranks_train_and_write_nothing(typed: Typed, train, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    go(typed, "stage=sft")
    assert train.order == ["sft"] and not find(Path("outputs"))


def test_several_devices_train_in_a_child_process(typed: Typed, train, monkeypatch) -> None:
    """The child is `python -m rlhf.running.worker DIRECTORY`: Lightning repeats this step alone for each rank."""
    started: list[list[str]] = []

    class Child:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            assert env["RLHF_PARENT"] == str(os.getpid()) and env["RLHF_DIRECTORY"] == os.getcwd(), env
            started.append(command)
            folder = Path(command[-1])
            (folder / ".result.json").write_text('{"metrics": {"val/loss": 1.0}, "memory": {}}')

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(pipeline.subprocess, "Popen", Child)
    assert go(typed, "stage=sft", "trainer.devices=2") == 1.0
    assert started[0][1:3] == ["-m", "rlhf.running.worker"] and train.calls == []
    assert Run(Path(started[0][-1])).finished


def test_an_error_of_the_child_process_is_reported_once_with_its_status(typed: Typed, train, monkeypatch) -> None:
    """The worker runs here, as rank 0; it passes the error to the process that started it."""

    def refuse(name: str, folder: Path) -> None:
        if name == "sft":
            raise UserError("is too small", f"set {key('data.max_length', 4)}", "data.size", 3)

    class Child:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            self.folder = Path(command[-1])

        def wait(self) -> int:
            return worker.main(self.folder)

    train.then = refuse
    monkeypatch.setattr(pipeline, "subprocess", SimpleNamespace(Popen=Child))
    with pytest.raises(UserError, match="^sft.data.size=3: is too small; set sft.data.max_length=4$"):
        go(typed, "pipeline=dpo", "trainer.devices=2")
    assert Run(train.folders["sft"]).status == "failed" and not (train.folders["sft"] / ".result.json").exists()


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "mnt/x.ckpt"), UserError, "mnt/x.ckpt: No space left on"),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed"),
            RunFailed,
            "another rank ended",
        ),
    ],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_errors_of_one_rank_are_reported_in_one_line(
    typed: Typed, train, monkeypatch, capsys, error: Exception, kind: type[RLHFError], said: str, rank: str
) -> None:
    """A full disk in a worker, and a worker whose peer ended: no traceback, on rank 0 or on other ranks."""
    statuses = []

    def fail(name: str, folder: Path) -> None:
        raise error

    class Child:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            self.folder = Path(command[-1])

        def wait(self) -> int:
            with monkeypatch.context() as own:
                own.setenv("LOCAL_RANK", rank)
                statuses.append(worker.main(self.folder))
            return statuses[0]

    train.then = fail
    monkeypatch.setattr(pipeline, "subprocess", SimpleNamespace(Popen=Child))
    with pytest.raises(kind if rank == "0" else RunFailed, match=said if rank == "0" else "see their output above$"):
        go(typed, "stage=sft", "trainer.devices=2")
    assert statuses == [kind.exit_code]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == (rank == "1") and all(said in line for line in lines)
