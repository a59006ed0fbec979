"""A broken run is named and costs only its own numbers; lists, reports and other runs are unaffected."""

import json
import multiprocessing
import os
import socket
from pathlib import Path

import pytest

from rlhf.cli import report
from rlhf.cli import runs as command
from rlhf.data.contamination import overlap_warnings
from rlhf.errors import UserError
from rlhf.planning import references
from rlhf.report.members import find_runs
from rlhf.runs import run_directory, run_files
from rlhf.runs.run_directory import Run
from rlhf.storage import files, locks
from rlhf.using import eval_file, named
from tests.runs.test_runs import make

STATUS = {"status": "finished", "pid": 7, "attempt": 1, "command": "rlhf stage=dpo", "started": "2026-01-01T00:00:00"}
SUMMARY = {"metrics": {"loss": 0.25}, "headline": "loss", "value": 0.25, "wall_s": 62.0}
LINEAGE = {"fingerprint": "eeee000000" + "0" * 54, "inputs": {}, "ancestors": {}}
EVALUATION = {"before": {"gold": {"mean": 0.5}}, "after": {"gold": {"mean": 0.75}}, "differences": {}, "kl": None}
HALF = b'{"status": "finished", "metrics": {"lo'

# File -> invalid contents, each with a word of the line that names it.
BROKEN: dict[str, list[tuple[bytes | dict, str]]] = {
    "status.json": [
        (STATUS | {"pid": "x"}, "pid is 'x', not a process id"),
        (STATUS | {"pid": 10**30}, "pid is"),
        (STATUS | {"attempt": "x"}, "attempt is 'x', not a whole number"),
        (STATUS | {"started": 5}, "started is 5, not a string"),
        (STATUS | {"fingerprint": ["x"]}, "fingerprint is"),
        (HALF, "not JSON"),
        (b"\xff\xfe\x00", "not JSON in UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "is not a mapping"),
    ],
    "summary.json": [
        (SUMMARY | {"wall_s": "abc"}, "wall_s is 'abc', not a number"),
        (SUMMARY | {"wall_s": float("nan")}, "wall_s is nan"),
        (SUMMARY | {"metrics": "abc"}, "metrics is 'abc', not a mapping"),
        (SUMMARY | {"metrics": {"loss": [1]}}, "metrics is"),
        (SUMMARY | {"value": "abc"}, "value is 'abc'"),
        (SUMMARY | {"peak_memory_bytes": 5}, "peak_memory_bytes is 5"),
        (HALF, "not JSON"),
        (b'["a list"]', "is not a mapping"),
    ],
    "lineage.json": [
        (LINEAGE | {"inputs": "sft"}, "inputs is 'sft', not a mapping"),
        (LINEAGE | {"inputs": {"policy": "sft"}}, "not a list"),
        (LINEAGE | {"ancestors": {"a": 5}}, "ancestors is"),
        (LINEAGE | {"ancestors": {"a": {"folder": 5}}}, "not a string"),
        (LINEAGE | {"fingerprint": 5}, "fingerprint is 5"),
        (HALF, "not JSON"),
    ],
    "config.yaml": [
        (b"a: [1, 2", "while parsing"),
        (b"model: 5\nseed: 0\n", "model is 5, not a mapping"),
        (b"model: {path: [1]}\n", "model is"),
        (b"inputs: {policy: 5}\n", "inputs is"),
        (b"- a\n- list\n", "is not a mapping"),
        (b"\xff\xfe\x00\x01", "config.yaml"),
    ],
    "evaluation-abc.json": [
        (HALF, "not JSON"),
        (b"[1]", "is not a mapping"),
        (EVALUATION | {"after": {"gold": 5}}, "after is"),
        (EVALUATION | {"after": {"gold": {"mean": "x"}}}, "after is"),
        (EVALUATION | {"kl": 5}, "kl is 5"),
        (EVALUATION | {"samples": [5]}, "samples is"),
    ],
}
CASES = [(name, content, said) for name, cases in BROKEN.items() for content, said in cases]


def lines(run: Run) -> list[str]:
    """Return the problems of a run's files as they are printed."""
    return [str(problem) for problem in run.problems()]


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("outputs")


def test_a_broken_file_is_named_and_affects_no_other_run(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = make(outputs, "dpo", "ffff000000")
    broken: dict[Path, tuple[Run, str]] = {}
    for number, (name, content, said) in enumerate(CASES):
        run = make(outputs, "dpo", f"e{number:03d}000000")
        content = json.dumps(content).encode() if isinstance(content, dict) else content
        (run.folder / name).write_bytes(content)
        broken[run.folder / name] = run, said
    for path, (run, said) in broken.items():
        assert any(line.startswith(f"{path}: ") and said in line for line in lines(run)), (path, lines(run))
        assert named.ancestors(run) == [] and named.testbed(run) is None and named.started_from(run) is None
        if path.name != "status.json":
            assert references.resolve(run.folder.name[:4], "policy", outputs).run == run.folder

    assert command.main(["list"]) == 0
    listed = capsys.readouterr().out.replace("\n", "")
    assert command.main(["check"]) == 1
    checked = capsys.readouterr().out
    assert report.main([str(outputs), "--metric", "loss", "--out", "page"]) == 0
    reported = capsys.readouterr().out
    assert str(good.folder) in listed and "dpo/ffff00" in Path("page/report.html").read_text()
    for path, (run, _) in broken.items():
        assert str(run.folder) in listed and f"{path}: " in reported and f"{path}: " in checked
        assert (f"{path}: " in listed) == (path.name in ("status.json", "summary.json"))
    for path, (run, _) in broken.items():
        if path.name != "status.json":
            assert command.main(["show", str(run.folder)]) == 0 and f"{path}: " in capsys.readouterr().out
    assert command.main(["rm", *(str(run.folder) for run, _ in broken.values()), "--yes"]) == 0
    assert [run.folder for run in run_directory.find(outputs)] == [good.folder]


def test_a_broken_status_restarts_the_count_of_attempts(outputs: Path) -> None:
    run = make(outputs, "dpo", "eeee000000", status="failed")
    content = json.loads((run.folder / "status.json").read_text()) | {"attempt": "x"}
    files.write_json(run.folder / "status.json", content)
    run.begin({"seed": 0}, LINEAGE, "rlhf stage=dpo")
    assert run.status_file["attempt"] == 1


def test_an_edited_fingerprint_is_ignored(outputs: Path) -> None:
    run = make(outputs, "dpo", "eeee000000")
    whole = run.fingerprint
    for name in ("status.json", "lineage.json"):
        files.write_json(
            run.folder / name, json.loads((run.folder / name).read_text()) | {"fingerprint": "abab" + "1" * 60}
        )
        assert run.fingerprint == (whole if name == "status.json" else "eeee000000")


def test_a_cyclic_lineage_terminates(outputs: Path) -> None:
    run = make(outputs, "dpo", "eeee000000")
    ancestor = {"stage": "dpo", "folder": str(run.folder), "parents": ["a"], "inputs": {"policy": ["a"]}}
    files.write_json(run.folder / "lineage.json", LINEAGE | {"ancestors": {"a": ancestor}, "inputs": {"policy": ["a"]}})
    assert named.ancestors(run) == [run]
    assert report.main([str(run.folder), "--out", "page"]) == 0


@pytest.mark.parametrize("name", ["status.json", "summary.json", "lineage.json", "config.yaml"])
def test_a_named_pipe_in_place_of_a_file_is_not_read(outputs: Path, name: str) -> None:
    run = make(outputs, "dpo", "eeee000000")
    (run.folder / name).unlink()
    os.mkfifo(run.folder / name)
    assert any("is a named pipe" in line for line in lines(run)), lines(run)


def test_unreadable_rows_and_arrays_are_skipped(outputs: Path) -> None:
    run = make(outputs, "dpo", "eeee000000")
    rows = [b"[1]", b"5", HALF, b"\xff", b'{"prompt": [5], "response": "x"}', b'{"prompt": "Hi?", "response": "Ho."}']
    (run.folder / "samples.jsonl").write_bytes(b"\n".join(rows))
    (run.folder / "eval.json").write_bytes(b"[1]")
    (run.folder / "trained_on.npy").write_bytes(b"\x93NUMPYgarbage")
    assert eval_file.read(run.folder / "eval.json") == []
    assert report.main([str(run.folder), "--out", "page"]) == 0 and "Ho." in Path("page/report.html").read_text()
    from rlhf.data.records import Message, Prompt

    (line,) = overlap_warnings([Prompt((Message("user", "Hi?"),))], {"e": run.folder}, None)
    assert "trained_on.npy cannot be read" in line


# Whether a run is running is decided by its lock


def test_a_run_of_another_host_or_a_reused_process_id_does_not_count_as_running(outputs: Path) -> None:
    run = make(outputs, "dpo", "eeee000000")
    for pid, host in ((1, "elsewhere"), (os.getpid(), socket.gethostname())):
        run.write_status("running", pid=pid, host=host)
        assert run.status == "killed"
        with run.lock():
            assert run.status == "running" and run.last_status == "killed"
        assert run.status == "killed"


def test_a_lock_is_released_when_its_process_ends(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def hold() -> None:
        with locks.lock(tmp_path / "lock"):
            ready.set()
            context.Event().wait()

    child = context.Process(target=hold)
    child.start()
    assert ready.wait(20) and locks.is_locked(tmp_path / "lock")
    with pytest.raises(locks.Locked), locks.lock(tmp_path / "lock"):
        pass
    child.kill()
    child.join()
    assert locks.is_locked(tmp_path / "lock") is False
    with locks.lock(tmp_path / "lock"):
        pass


def test_the_lock_of_a_removed_directory_is_not_held(tmp_path: Path) -> None:
    run = Run(tmp_path / "sft" / "eeee000000")
    context = multiprocessing.get_context("fork")
    waiting, removed = context.Event(), context.Event()

    def second() -> None:
        with run.lock(waiting.set):
            (run.folder / "mine").touch()
            assert removed.wait(20)

    child = context.Process(target=second)
    with run.lock():
        child.start()
        assert waiting.wait(20)
        command.delete(run)
    removed.set()
    child.join(20)
    assert child.exitcode == 0 and (run.folder / "mine").exists() and (run.folder / ".lock").exists()


# Removing


def test_rm_removes_only_real_runs_of_its_outputs(outputs: Path, tmp_path: Path) -> None:
    run = make(outputs, "sft", "3f2a91bc04")
    other = make(Path("elsewhere"), "sft", "aaaa000000")
    odd = Path("mine")
    odd.mkdir()
    files.write_json(odd / "status.json", {"status": "finished"})
    Path("outputs/sft/bbbb000000").symlink_to(other.folder.absolute())
    deep = make(outputs, "sft/deeper", "cccc000000")
    files.write_json(Path("status.json"), {"status": "finished"})
    files.write_json(tmp_path.parent / "status.json", {"status": "finished"})
    wrong = ["", " ", ".", "..", "../..", "/", "outputs", "outputs/", "outputs/sft", "outputs/sft/", "mine", "3f"]
    wrong += [str(other.folder), str(odd.absolute()), "outputs/sft/bbbb000000", str(deep.folder)]
    wrong += ["outputs/sft/3f2a91bc04/..", "outputs/sft/3f2a91bc04/../../..", "outputs/../mine"]
    for ref in wrong:
        with pytest.raises(UserError):
            command.main(["rm", ref, "--yes", "--force"])
    assert run.finished and other.finished and deep.finished and odd.exists() and Path("status.json").exists()
    assert command.main(["rm", "outputs/../outputs/sft/3f2a91bc04", "--yes"]) == 0 and not run.folder.exists()
    assert other.finished
    (tmp_path.parent / "status.json").unlink()


@pytest.mark.parametrize("status", ["finished", "running", "stopped", "failed", "killed"])
def test_rm_keeps_runs_that_another_run_reads(outputs: Path, status: str) -> None:
    sft = make(outputs, "sft", "3f2a91bc04")
    child = make(outputs, "dpo", "eeee000000", parent=sft, status="running" if status == "killed" else status)
    with pytest.raises(UserError, match=r"outputs/dpo/eeee000000 .* outputs/sft/3f2a91bc04; type --force"):
        command.main(["rm", "3f2a", "--yes"])
    assert sft.finished
    assert command.main(["rm", "3f2a", "--yes", "--force"]) == 0 and not sft.folder.exists() and child.folder.exists()


def test_a_killed_rm_leaves_no_partial_run(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(outputs, "sft", "3f2a91bc04")
    other = make(outputs, "sft", "3f2b000000")

    def killed(folder: Path) -> None:
        (folder / "model" / "config.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(command, "remove", killed)
        command.main(["rm", "3f2a", "--yes"])
    assert not run.folder.exists() and [found.folder for found in run_directory.find(outputs)] == [other.folder]
    assert references.find_by_prefix(Path("outputs/sft/3")) == [other.folder]
    assert [found.folder.name for found in find_runs("outputs/sft", outputs)] == ["3f2b000000"]
    assert list(outputs.glob("sft/.removed-*"))
    assert command.main(["rm", "--unfinished", "--yes"]) == 0  # removes what was left
    assert not list(outputs.glob("sft/.removed-*")) and other.finished


# Manifests


def test_a_finished_run_with_changed_files_counts_as_damaged(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(outputs, "sft", "3f2a91bc04")
    weights = run.folder / "model" / "model.safetensors"
    weights.write_bytes(b"0123456789")
    run.write_manifest()
    assert run.finished and command.main(["check"]) == 0
    weights.write_bytes(b"0123456780")  # of the same size: detected by the hashes alone
    assert run.finished and command.main(["check"]) == 1
    assert f"{weights} has other content than when it was written" in capsys.readouterr().out
    weights.write_bytes(b"01234")
    assert run.status == "damaged" and not run.finished
    assert command.main(["list", "--status", "damaged"]) == 0
    assert f"{weights} has 5 bytes, 10 when it was written" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"not finished \(damaged: model/model.safetensors has 5 bytes.*rlhf stage=sft"):
        references.resolve("3f2a", "policy", outputs)
    weights.unlink()
    assert run.status == "damaged" and "No such file" in run.damage()["model/model.safetensors"]
    weights.write_bytes(b"0123456789")
    assert run.finished
    (run.folder / "manifest.json").write_bytes(HALF)
    assert run.status == "damaged"


@pytest.mark.parametrize("name", ["status.json", "summary.json", "lineage.json", "config.yaml", "samples.jsonl"])
def test_a_named_pipe_among_the_files_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    run = make(Path("outputs"), "sft", "a" * 64)
    (run.folder / name).unlink(missing_ok=True)
    os.mkfifo(run.folder / name)
    assert command.main(["list"]) == 0
    assert run_files.rows(run.folder / name, 3) == []
    assert lines(run) == (
        [] if name == "samples.jsonl" else [f"{run.folder / name}: is a named pipe or a device, not a file"]
    )


def test_a_config_that_contains_itself_is_refused(tmp_path: Path) -> None:
    run = make(tmp_path / "outputs", "sft", "a" * 64)
    (run.folder / "config.yaml").write_text("a: &a [*a]\n")
    assert run.plain_config == {}
    (problem,) = run.problems("config.yaml")
    assert "its aliases" in problem.problem and problem.fix == "write the values without aliases"


def test_check_names_the_command_that_recomputes_a_changed_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path / "outputs", "sft", "a" * 64)
    (run.folder / "selected_responses.jsonl").write_text("12345\n")
    run.write_manifest()
    # of the same size, so that the run counts as finished
    (run.folder / "selected_responses.jsonl").write_text("12346\n")
    assert run.status == "finished"
    assert command.check([run]) == 1
    assert f"rlhf runs rm --force {run.folder}\n" in capsys.readouterr().out
