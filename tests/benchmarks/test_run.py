"""A whole run of the command, failures as rows, and the file that it writes."""

import json
from dataclasses import replace

import pytest

from benchmarks import models, peer_environment, report, runner
from benchmarks.__main__ import main
from benchmarks.cases import CASES
from benchmarks.runner import Settings, run_case

SIDE = {
    "seconds",
    "tokens_per_second",
    "samples_per_second",
    "peak_memory_bytes",
    "flops",
    "mfu",
    "threads",
}


@pytest.mark.slow
def test_command_measures_sft_on_the_same_rows(tmp_path, capsys):
    pytest.importorskip("trl", reason="TRL is the peer: pip install 'rlhf[dev]'")
    words = ["--case", "sft", "--model", "tiny", "--steps", "2", "--repeats", "1", "--device", "cpu"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    content = json.loads(file.read_text())
    assert content.keys() == {"started", "machine", "settings", "rows"}
    assert {"device", "processor", "commit", "versions", "threads"} <= content["machine"].keys()
    (row,) = content["rows"]
    assert row["identical_rows"] is True
    for side in ("ours_result", "peer_result"):
        assert row[side].keys() == SIDE
        assert row[side]["seconds"].keys() == {"median", "mean", "std", "min", "max", "values"}
        assert row[side]["peak_memory_bytes"] > 0
    assert row["ours_result"]["flops"] == row["peer_result"]["flops"]
    assert row["ratio"].keys() == {"median", "mean", "memory"}
    assert "| sft | tiny | ours |" in capsys.readouterr().out


def test_a_side_that_fails_is_a_row_with_its_error():
    case = replace(CASES["sft"], model="tiny", family="absent")
    row = run_case(case, Settings(repeats=1, sides=("ours",)), rate=1e9)
    assert row["ours_result"] == {"error": "ModuleNotFoundError: No module named 'benchmarks.absent'"}
    assert "ratio" not in row and row["config"]["length"] == 128
    assert report.table([row]).count("No module named 'benchmarks.absent'") == 1


def test_a_killed_side_names_the_signal(monkeypatch, tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nkill -9 $$\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(runner.sys, "executable", str(tmp_path / "python"))
    row = run_case(replace(CASES["sft"], model="tiny"), Settings(repeats=1, sides=("ours",)), rate=1e9)
    assert "SIGKILL" in row["ours_result"]["error"] and "peer_result" not in row


def test_an_absent_peer_environment_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_PEER_ENVIRONMENT", str(tmp_path / "absent"))
    row = run_case(replace(CASES["ppo"], model="tiny"), Settings(repeats=1, sides=("peer",)), rate=1e9)
    assert peer_environment.COMMAND in row["peer_result"]["error"]


def test_a_model_that_is_absent_is_a_row_with_its_error(monkeypatch):
    def absent(name):
        raise models.UserError("no such model")

    monkeypatch.setattr(models, "model_folder", absent)
    row = run_case(CASES["sft"], Settings(), rate=1e9)
    assert row["ours_result"] == row["peer_result"] == {"error": "no such model"}


def test_the_file_is_named_after_the_device(tmp_path):
    machine = {"device": "NVIDIA H100 80GB HBM3", "processor": "any"}
    assert report.write(tmp_path, {"machine": machine}).name == "nvidia-h100-80gb-hbm3.json"


@pytest.mark.parametrize("words", [["--steps", "0"], ["--case", "absent"], ["--model", "absent"]])
def test_wrong_words_are_one_line(words, capsys):
    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("python -m benchmarks: error: argument")
