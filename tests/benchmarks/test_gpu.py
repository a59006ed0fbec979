"""GPU checks: failures of every kind are recorded and the next check runs; the page is made of the file."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import page, runner, wheels
from benchmarks.gpu.checks import Check, checks
from benchmarks.gpu.child import is_out_of_memory
from benchmarks.gpu.exactness import compare_rows, compare_weights
from benchmarks.gpu.runner import Settings, run_checks

ROOT = Path(__file__).resolve().parents[2]


def check(name: str, limit: float = 30, alone: bool = True) -> Check:
    return Check(name, name, f"tests.benchmarks.faults:{name}", limit, alone)


def settings(folder: Path, budget: float = 600, jobs: int = 1) -> Settings:
    return Settings(device="cpu", small=True, budget=budget, jobs=jobs, folder=folder, threads=1)


def test_every_ending_is_recorded_and_the_next_check_runs(tmp_path):
    names = ("well", "raises", "beyond", "refused", "skipped", "exhausts", "dies", "exits")
    written: list[list[dict[str, Any]]] = []
    chosen = [
        *map(check, names),
        check("hangs", limit=1),
        Check("last", "last", "tests.benchmarks.faults:well", 30, True),
    ]
    run_checks(chosen, settings(tmp_path), lambda results: written.append(list(results)))
    results = {result["check"]: result for result in written[-1]}
    assert [len(rows) for rows in written] == list(range(1, len(chosen) + 1))  # the file is written after each
    assert {name: result["status"] for name, result in results.items()} == {
        "well": "passed",
        "raises": "failed",
        "beyond": "failed",
        "refused": "refused",
        "skipped": "skipped",
        "exhausts": "out of memory",
        "dies": "killed",
        "exits": "failed",
        "hangs": "timeout",
        "last": "passed",
    }
    assert results["well"]["figures"] == {"value": 1, "device": "cpu"}
    assert results["raises"]["error"][-1] == "ValueError: a fault"
    assert results["beyond"]["figures"] == {"difference": 2.0}
    assert results["beyond"]["error"] == ["beyond the tolerance: sft"]
    assert results["dies"]["error"] == ["killed by SIGKILL"]
    assert results["exits"]["error"] == ["exit status 3", "before the end"]
    assert results["hangs"]["error"] == ["waiting"]
    child = int((tmp_path / "hangs" / "pid").read_text())
    status = Path(f"/proc/{child}/stat")  # a zombie until its parent's parent reads it
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_what_does_not_fit_the_budget_is_recorded(tmp_path):
    written: list[list[dict[str, Any]]] = []
    run_checks([check("well"), check("hangs", limit=60)], settings(tmp_path, budget=5), written.append)
    assert [result["status"] for result in written[-1]] == ["not run: time", "not run: time"]
    assert all(result["seconds"] == 0 for result in written[-1])


def test_a_check_gets_no_more_than_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "LEAST", 1.0)
    result = runner.run_check(check("hangs", limit=60), settings(tmp_path), left=2.0)
    assert result["status"] == "timeout" and result["limit"] == 2.0


def test_checks_beside_each_other_keep_their_order(tmp_path):
    written: list[list[dict[str, Any]]] = []
    chosen = [check("well"), check("skipped", alone=False), check("refused", alone=False), check("beyond")]
    run_checks(chosen, settings(tmp_path, jobs=2), lambda results: written.append(list(results)))
    assert [result["check"] for result in written[-1]] == ["well", "skipped", "refused", "beyond"]


def test_the_device_running_out_of_memory_is_recognised():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError())


def test_the_command_writes_the_file_and_fails_with_a_check(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "checks", lambda small: [check("well"), check("beyond")])
    out = tmp_path / "results" / "gpu.json"
    assert command.main(["--small", "--out", str(out), "--commit", "abc"]) == 1
    content = json.loads(out.read_text())
    assert content["commit"] == "abc" and content["small"] is True
    assert [result["status"] for result in content["checks"]] == ["passed", "failed"]
    assert "1 passed, 1 failed" in capsys.readouterr().out
    assert command.main(["--small", "--out", str(out), "--check", "well"]) == 0
    monkeypatch.setenv("OUT", str(tmp_path / "given"))
    assert command.main(["--small", "--check", "well"]) == 0 and (tmp_path / "given" / "gpu.json").is_file()
    with pytest.raises(SystemExit):
        command.main(["--check", "absent"])


def test_every_check_names_a_function():
    for small in (False, True):
        known = checks(small)
        assert len({one.name for one in known}) == len(known)
        for one in known:
            module, _, name = one.function.partition(":")
            assert callable(getattr(__import__(module, fromlist=[name]), name))


def test_the_runner_imports_no_torch():
    code = "import sys, benchmarks.gpu.__main__; assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)


def test_metrics_are_compared_to_a_tolerance():
    rows = [{"loss": 2.0, "epoch": 0.0}, {"loss": 1.0, "epoch": 0.0}]
    assert compare_rows(rows, rows) == (0.0, "")
    near = [rows[0], {"loss": 1.0005, "epoch": 1.0}]
    worst, place = compare_rows(near, rows)
    assert worst == pytest.approx(5e-4 / (1e-4 + 1e-3)) and place == "loss in row 1"
    assert compare_rows([rows[0], {"loss": math.nan}], rows)[0] == math.inf
    assert compare_rows(rows[:1], rows)[0] == math.inf
    assert compare_rows([rows[0], {"other": 1.0}], rows)[0] == math.inf


def test_weights_are_compared_by_name():
    weights = {"a": torch.zeros(2), "b": torch.ones(2)}
    assert compare_weights(weights, weights) == 0
    assert compare_weights({**weights, "b": torch.tensor([1.0, 1.5])}, weights) == 0.5
    assert compare_weights({"a": torch.zeros(2)}, weights) == math.inf


def test_wheels_of_installed_packages_are_left_out(tmp_path):
    for name in ("torch-2.13.0-cp311-none.whl", "no_such_package-1.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    assert [path.name for path in wheels.missing(tmp_path)] == ["no_such_package-1.0-py3-none-any.whl"]


CONTENT = {
    "command": "benchmarks/gpu.sh",
    "commit": "abc",
    "started": "2026-01-01T00:00:00+00:00",
    "seconds": 500.0,
    "checks": [
        {
            "check": "device",
            "title": "the device",
            "status": "passed",
            "seconds": 20.0,
            "figures": {"device": "a GPU", "matrix_rate_tflops": {"bf16": 790.4}, "versions": {"torch": "2.11.0"}},
        },
        {
            "check": "sft_135m",
            "title": "sft",
            "status": "passed",
            "seconds": 30.0,
            "figures": {
                "seconds_per_step": 0.1,
                "tokens_per_s": 123456.0,
                "samples_per_s": 80.0,
                "mfu": 0.4,
                "peak_memory_gb": 10.0,
                "predicted_memory_gb": 9.0,
            },
        },
        {
            "check": "resume",
            "title": "resume",
            "status": "failed",
            "seconds": 9.0,
            "figures": {"sft": {"same_bits": False}},
            "error": ["a | b"],
        },
    ],
}


def test_the_page_has_every_figure():
    text = page.render(CONTENT)
    assert "| sft_135m | 0.1 | 123,456 | 80 | 0.4 | 10 | 9 |" in text
    assert "| resume | sft.same_bits | no |" in text
    assert "| matrix_rate_tflops.bf16 | 790 |" in text and "| versions.torch | 2.11.0 |" in text
    assert "```\na | b\n```" in text and page.NOTHING not in text


def test_the_page_is_what_the_command_makes(tmp_path):
    """Edit docs/gpu.json or benchmarks/gpu/page.py, then type ``python -m benchmarks.gpu --page``."""
    source = ROOT / "docs" / "gpu.json"
    if source.is_file():
        (tmp_path / "gpu.json").write_bytes(source.read_bytes())
    assert page.write_page(tmp_path).read_text() == (ROOT / "docs" / "gpu.md").read_text()
