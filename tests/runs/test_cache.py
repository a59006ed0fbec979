"""rlhf cache: what is listed, and that nothing else is removed."""

import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlhf.cli.cache import entries, main
from rlhf.errors import UserError
from rlhf.storage.cache import mark_used, remember
from rlhf.storage.locks import lock


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "cache"
    monkeypatch.setenv("RLHF_CACHE", str(home))
    (home / "reference").mkdir(parents=True)
    save_file({"logp": torch.zeros(300)}, home / "reference" / "ab12.safetensors", {"reference": "outputs/sft/3f2a"})
    (home / "reference" / "cd34.safetensors").write_bytes(b"torn")
    model = home / "gguf" / "tiny-0123-1"
    model.mkdir(parents=True)
    (model / "gguf.json").write_text('{"path": "/models/tiny.gguf"}')
    (model / "model.safetensors").write_bytes(bytes(2_500_000))
    remember("code", "key", "text")
    (home / "mine").mkdir()  # not of the cache
    (home / "mine" / "notes").write_text("kept")
    return home


def test_list_prints_size_age_and_origin(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    month_ago = time.time() - 30 * 86400
    os.utime(cache / "reference" / "ab12.safetensors", (month_ago, month_ago))
    assert main(["list"]) == 0
    lines = {line.split()[0]: " ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert lines["reference/ab12.safetensors"].endswith(
        " 30 300 log-probabilities of a reference policy, outputs/sft/3f2a"
    )
    assert lines["reference/cd34.safetensors"] == (
        "reference/cd34.safetensors 4 B 0 log-probabilities of a reference policy"
    )
    assert (
        lines["gguf/tiny-0123-1"] == "gguf/tiny-0123-1 2.5 MB 0 weights converted from a GGUF file, /models/tiny.gguf"
    )
    assert lines["code"] == "code 4 B 0 digests of source files"
    assert "mine" not in lines and lines[f"{cache}:"] == f"{cache}: 2.5 MB"
    mark_used(cache / "reference" / "ab12.safetensors")
    assert all(entry.days < 1 for entry in entries())


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["reference"], {"code", "gguf/tiny-0123-1"}),
        (["reference/ab", "code"], {"gguf/tiny-0123-1", "reference/cd34.safetensors"}),
        (["--older", "7"], {"code", "gguf/tiny-0123-1", "reference/cd34.safetensors"}),
        (
            ["gguf", "--older", "7"],
            {"code", "gguf/tiny-0123-1", "reference/ab12.safetensors", "reference/cd34.safetensors"},
        ),
        (["--all"], set()),
    ],
)
def test_rm_removes_what_is_named(cache: Path, words: list[str], left: set[str]) -> None:
    os.utime(cache / "reference" / "ab12.safetensors", (0, 0))
    assert main(["rm", *words, "--yes"]) == 0
    assert {entry.name for entry in entries()} == left
    assert (cache / "mine" / "notes").read_text() == "kept"
    assert not [path for path in cache.rglob("*.removed")]


def test_rm_asks_and_refuses(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {entry.name for entry in entries()}
    assert main(["rm", "reference"]) == 1  # standard input is no terminal
    assert "type --yes" in capsys.readouterr().out
    for words in ([], ["../mine"], ["mine"], ["/"], [""], ["reference/../../mine"]):
        with pytest.raises(UserError):
            main(["rm", *words, "--yes"])
    assert {entry.name for entry in entries()} == before and (cache / "mine" / "notes").exists()


def test_rm_leaves_entries_that_are_being_written(cache: Path) -> None:
    with lock(cache / "reference" / "ab12.lock"), pytest.raises(UserError, match="is being written"):
        main(["rm", "reference/ab12", "--yes"])
    (cache / "gguf" / ".new.part").mkdir()
    with lock(cache / "gguf" / ".new.lock"), pytest.raises(UserError, match="is being written"):
        main(["rm", "gguf/.new", "--yes"])
    assert (cache / "reference" / "ab12.safetensors").exists() and (cache / "gguf" / ".new.part").exists()
    assert main(["rm", "reference/ab12", "gguf/.new", "--yes"]) == 0
    assert not list(cache.rglob("*.lock"))


def test_rm_follows_no_link(cache: Path) -> None:
    (cache / "gguf" / "elsewhere").symlink_to(cache / "mine")
    (cache / "benchmarks").symlink_to(cache / "mine")
    assert main(["rm", "--all", "--yes"]) == 0
    assert (cache / "mine" / "notes").exists() and not (cache / "gguf" / "elsewhere").is_symlink()
