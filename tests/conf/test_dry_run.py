"""Sweeps are validated in full before their first job starts; ``--dry-run`` and ``--cfg job`` run nothing."""

from pathlib import Path

import pytest

from rlhf.cli import main

TINY = "stage=pretrain data.size=64"


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> tuple[int, str, str]:
        status = main.run(line.split())
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"{TINY} optimizer.lr=1e-4,nan -m", ["optimizer.lr=nan: should be", "(job 1; no job was started)"]),
        (f"{TINY} seed=0,1,2 stage.epochs=0,1 -m", ["stage.epochs=0: should be greater than 0 (jobs 0, 2, 4; no job"]),
        (f"{TINY} seed=0,1 stage.epochs=0 -m", ["stage.epochs=0: should be greater than 0\n"]),
        ("sweep=seeds", ["nothing to run; type stage=NAME or pipeline=NAME"]),
        (f"{TINY} sweep=seeds stage.epochs=0", ["stage.epochs=0: should be greater than 0\n"]),
        (f"{TINY} seed=0,1 stage.epochs=0 hydra.mode=MULTIRUN", ["stage.epochs=0: should be greater than 0\n"]),
        ("sweep=seeds -m", ["nothing to run; type stage=NAME or pipeline=NAME"]),
        (
            f"{TINY} seed=0,1 hydra.launcher.n_jobs=0 -m",
            ["hydra.launcher.n_jobs=0: must be at least 1; type hydra.launcher.n_jobs=1"],
        ),
        (
            f"{TINY} seed=0,1 hydra.launcher.retries=-1 -m",
            ["hydra.launcher.retries=-1: must be at least 0; type hydra.launcher.retries=0"],
        ),
        (f"{TINY} seed=0,1 hydra.launcher.timeout_s=0 -m", ["hydra.launcher.timeout_s=0"]),
        (f"{TINY} seed=0,1 -m --cfg all", ["--cfg all: a sweep shows the configs of its jobs; type --cfg job"]),
        (f"{TINY} stage.epochs=0 --dry-run", ["stage.epochs=0: should be greater than 0"]),
        (f"{TINY} --cfg job --package nosuch", ["package 'nosuch' not found in config"]),
        (f"{TINY} --cfg job --package=nosuch", ["package 'nosuch' not found in config"]),
        (
            f"{TINY} seed=0 -m --cfg job -p nosuch",
            ["--package nosuch: is not in the config; type rlhf ..."],
        ),
    ],
)
def test_a_sweep_with_a_mistake_starts_no_job(typed, line: str, said: list[str]) -> None:
    status, out, err = typed(line)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert all(text in err for text in said), err
    assert not Path("outputs").exists()


def test_a_dry_run_shows_every_job_and_starts_none(typed) -> None:
    status, out, err = typed(f"{TINY} seed=0,1 -m --dry-run")
    assert status == 0 and err == ""
    assert out.count("# job") == 2 and out.count("  to run") == 2
    assert "# job 1: stage=pretrain data.size=64 seed=1" in out and not Path("outputs").exists()
    status, out, _ = typed(f"{TINY} --dry-run")
    assert status == 0 and out.startswith("pretrain  outputs/pretrain/") and not Path("outputs").exists()


def test_cfg_job_shows_the_config_of_every_job(typed) -> None:
    status, out, _ = typed(f"{TINY} optimizer.lr=0.1,0.2 -m --cfg job -p optimizer")
    assert status == 0 and "lr: 0.1\n" in out and "lr: 0.2\n" in out and not Path("outputs").exists()
