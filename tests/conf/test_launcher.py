"""The sweep launcher, with a Hydra app that needs no torch: each job is its own process."""

import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # fresh interpreters

ROOT = Path(__file__).resolve().parents[2]

APP = """
import json, os, signal, sys, time
from pathlib import Path
import hydra
from rlhf import discovery
from rlhf.running import launcher
from rlhf.cli.main import write_result

launcher.register()

def task(config):
    marks = Path("marks")
    marks.mkdir(exist_ok=True)
    (marks / f"{config.x}-{os.getpid()}").write_text(os.environ.get("OMP_NUM_THREADS", ""))
    if config.do == "sleep":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        time.sleep(60)
    if config.do == "crash" and config.x == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if config.do == "fail" and config.x == 2:
        write_result({"status": "failed", "error": "the loss became nan"})
        sys.exit(1)
    if config.do == "once" and len(list(marks.glob(f"{config.x}-*"))) == 1:
        sys.exit(1)
    value = float(config.x) ** 2
    run = Path("outputs/toy", f"run{config.x}")
    run.mkdir(parents=True, exist_ok=True)
    write_result({"status": "finished", "value": value, "run": str(run), "metrics": {"loss": value / 2}})
    return value

task.__module__ = "__main__"
hydra.main(version_base="1.3", config_path=os.path.abspath("conf"), config_name="root")(task)()
"""

ROOT_YAML = """
defaults: [_self_, override hydra/launcher: rlhf, override hydra/job_logging: none, override hydra/hydra_logging: none]
x: 1
y: 0
do: work
hydra: {run: {dir: .}, output_subdir: null, sweep: {dir: "sweeps/${sweep_name:}", subdir: "${hydra.job.num}"}}
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "root.yaml").write_text(ROOT_YAML)
    (tmp_path / "rlhf").write_text(textwrap.dedent(APP))
    return tmp_path


def environment() -> dict[str, str]:
    dropped = ("RLHF_RESULT", "OMP_NUM_THREADS", "HYDRA_FULL_ERROR")
    kept = {k: v for k, v in os.environ.items() if k not in dropped}
    return {**kept, "PYTHONPATH": str(ROOT), "RLHF_PLUGINS": "none"}


def start(app: Path, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(app / "rlhf"), *words],
        cwd=app,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def sweep(app: Path, *words: str) -> tuple[int, str]:
    process = start(app, *words)
    out, _ = process.communicate(timeout=120)
    return process.returncode, out


def folder(app: Path) -> Path:
    (found,) = (app / "sweeps").iterdir()
    return found


def rows(app: Path) -> list[dict[str, str]]:
    with (folder(app) / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_each_job_is_a_process_and_the_table_has_its_result(app: Path) -> None:
    code, out = sweep(app, "x=1,2,3", "hydra.launcher.n_jobs=2", "-m")
    assert code == 0, out
    assert "3 of 3 jobs finished" in out
    table = rows(app)
    assert [(r["x"], r["status"], r["value"], r["loss"]) for r in table] == [
        ("1", "finished", "1.0", "0.5"),
        ("2", "finished", "4.0", "2.0"),
        ("3", "finished", "9.0", "4.5"),
    ]
    marks = [p.name for p in (app / "marks").iterdir()]
    assert len({m.split("-")[1] for m in marks}) == 3
    # Concurrent jobs share the cores.
    threads = (app / "marks" / marks[0]).read_text()
    assert threads == str(max(1, (os.cpu_count() or 1) // 2))
    for row in table:
        job = folder(app) / row["job"]
        assert (job / "run").resolve() == (app / row["run"]).resolve()
        assert json.loads((job / "result.json").read_text())["status"] == "finished"
    # Typed again: the same sweep directory, no second set of jobs.
    assert sweep(app, "x=1,2,3", "hydra.launcher.n_jobs=2", "-m")[0] == 0
    assert len(rows(app)) == 3
    assert len([p for p in folder(app).iterdir() if p.is_dir()]) == 3


@pytest.mark.parametrize(("do", "reason"), [("fail", "the loss became nan"), ("crash", "SIGKILL")])
def test_a_job_that_fails_or_dies_affects_no_other_job(app: Path, do: str, reason: str) -> None:
    code, out = sweep(app, "x=1,2,3", f"do={do}", "-m")
    assert code == 1
    assert [r["status"] for r in rows(app)] == ["finished", "failed", "finished"]
    assert reason in rows(app)[1]["error"]
    assert "2 of 3 jobs finished" in out


def test_a_job_gets_the_config_directory_and_the_config_name_of_the_sweep(app: Path) -> None:
    (app / "mine").mkdir()
    (app / "mine" / "other.yaml").write_text("defaults: [root, _self_]\ny: 5\n")
    code, out = sweep(app, "--config-dir", "mine", "--config-name", "other", "x=1", "-m")
    assert code == 0, out
    (console,) = folder(app).glob("*/console.log")
    assert f"--config-dir {app / 'mine'} --config-name other x=1 hydra.mode=RUN" in console.read_text()


def test_a_failed_job_is_retried(app: Path) -> None:
    code, out = sweep(app, "x=1,2", "do=once", "hydra.launcher.retries=1", "-m")
    assert code == 0, out
    assert [r["status"] for r in rows(app)] == ["finished", "finished"]
    assert out.count("starts again") == 2


def test_a_job_beyond_its_time_limit_is_stopped(app: Path) -> None:
    code, out = sweep(app, "x=1", "do=sleep", "hydra.launcher.timeout_s=1.5", "-m")
    assert code == 1
    assert rows(app)[0]["status"] == "timeout"
    assert "timeout_s" in out


def test_interrupt_stops_the_running_jobs_and_reports_the_unfinished_ones(app: Path) -> None:
    process = start(app, "x=1,2,3", "do=sleep", "-m")
    deadline = time.monotonic() + 60
    while not list(app.glob("marks/1-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "3 of 3 jobs not finished; type the same command again" in out
    assert [r["status"] for r in rows(app)] == ["stopped", "waiting", "waiting"]
    (mark,) = app.glob("marks/1-*")
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.name.split("-")[1]), 0)
