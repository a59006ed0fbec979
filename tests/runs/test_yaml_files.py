"""YAML read by the C library: the same values and the same errors as OmegaConf's own."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rlhf.runs import run_files
from rlhf.runs.run_directory import Run
from rlhf.storage import yaml_files

NUMBERS = "a: 1e-3\nb: 1_000\nc: 0x1F\nd: 010\ne: .5\nf: .inf\ng: 1:30\nh: 2020-01-01\ni: yes\nj: ~\nk: '1'\nl: 1.\n"
TEXTS = [
    NUMBERS,
    "a: 'it''s'\nb: |\n  x\n   y\nc: {d: [1, ~, {}]}\n",
    "a: &x {c: 1}\nb:\n  <<: *x\n",
    "a: ${b}\nb: 1\n",
    "1: a\ntrue: b\n",
    "a: !!set {x, y}\n",
    "a: !!binary aGVsbG8=\n",
    "a: 1\na: 2\n",
    "a: [1, 2",
    "a: ${",
    "a: *nope\n",
    "- 1\n",
    "text",
    "",
    "[" * 5000,
    "a: \x07\n",
]


def _outcome(read, path: Path) -> str:
    try:
        return repr(read(path))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_values_and_errors_equal_those_of_omegaconf(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert _outcome(yaml_files.load, path) == _outcome(lambda p: OmegaConf.to_container(OmegaConf.load(p)), path)


def test_plain_values_are_read_without_omegaconf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OmegaConf, "load", None)
    (tmp_path / "config.yaml").write_text("optimizer: {lr: 1e-3}\n")
    run = Run(tmp_path)
    run.plain_config["optimizer"]["lr"] = 5  # a copy: changes by one reader do not affect the next
    assert run.plain_config == {"optimizer": {"lr": 0.001}}


def test_files_are_read_once_when_cached(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run_files.cache_reads():
        (tmp_path / "status.json").write_text('{"status": "failed"}')
        assert run.status == "failed"
        (tmp_path / "status.json").write_text('{"status": "stopped"}')
        assert run.status == "failed"
    assert run.status == "stopped"
