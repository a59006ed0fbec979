"""Checkpoints are whole or absent; a torn one is detected, and the newest whole one is used."""

import errno
import os
import resource
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from rlhf.callbacks.checkpoints import AtomicCheckpointIO, latest
from rlhf.errors import UserError, os_error
from rlhf.storage import checkpoint_files, manifest
from rlhf.storage.batch_file import BatchFile
from rlhf.storage.metrics_file import MetricsFile, read_rows, unreadable


def save(folder: Path, step: int) -> Path:
    path = checkpoint_files.place(folder, step)
    AtomicCheckpointIO().save_checkpoint({"step": step, "weight": torch.arange(5000.0)}, path)
    return path


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 99)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # within the weights, which torch would load without an error
    path.write_bytes(content)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [cut, empty, garbage, flip, folder_instead])
def test_a_torn_checkpoint_is_skipped(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    older, newest = save(tmp_path, 4), save(tmp_path, 8)
    assert latest(tmp_path) == newest
    damage(newest)
    path, torn = checkpoint_files.newest_whole(tmp_path)
    assert path == older == latest(tmp_path) and list(torn) == [newest]
    assert torch.load(older, weights_only=True)["step"] == 4
    damage(older)
    with pytest.raises(UserError, match=rf"step=00000008.ckpt: .*; type `rlhf runs rm {tmp_path}` and then the same"):
        latest(tmp_path)


def test_other_files_are_not_taken_for_checkpoints(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    (tmp_path / "checkpoints").write_text("a file")
    assert latest(tmp_path) is None
    (tmp_path / "checkpoints").unlink()
    save(tmp_path, 3).with_name("step=abc.ckpt").touch()
    assert latest(tmp_path) == checkpoint_files.place(tmp_path, 3)


@pytest.mark.parametrize("fault", ["write", "flush", "rename"])
def test_a_failed_write_keeps_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Lightning's own writer leaves a file in TMPDIR, and half a checkpoint where that is another file system."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    older = save(tmp_path, 4)
    before = older.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    content: dict[str, object] = {"weight": torch.arange(9.0)}
    if fault == "write":
        content["late"] = Unpicklable()
    else:
        monkeypatch.setattr(*((os, "fsync", full) if fault == "flush" else (Path, "replace", full)))
    for path in (older, checkpoint_files.place(tmp_path, 8)):
        with pytest.raises(OSError, match="No space"):
            AtomicCheckpointIO().save_checkpoint(content, path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [older.name]
    assert older.read_bytes() == before and not list((tmp_path / "tmp").iterdir())


class Unpicklable:
    def __reduce__(self) -> str:
        raise OSError(28, "No space left on device")


def test_a_sharded_checkpoint_is_whole_once_it_has_a_manifest(tmp_path: Path) -> None:
    older, newest = save(tmp_path, 4), checkpoint_files.place(tmp_path, 8)
    newest.mkdir()
    (newest / "shard0").write_bytes(b"weights")
    assert latest(tmp_path) == older
    manifest.write(newest, [newest / "shard0"])
    assert latest(tmp_path) == newest
    (newest / "shard0").write_bytes(b"weightz")  # of the same size
    assert latest(tmp_path) == older


def test_batches_with_unreadable_lines_are_computed_again(tmp_path: Path, capsys) -> None:
    file = BatchFile(tmp_path, "responses")
    for batch in range(5):
        file.add(batch, value=batch)
    lines = file.path.read_bytes().split(b"\n")
    lines[1], lines[3] = b'{"batch": 1, "val', b"\0" * 20
    file.path.write_bytes(b"\n".join(lines) + b'{"batch": 5')
    again = BatchFile(tmp_path, "responses")
    assert list(again.mine(7)) == [1, 3, 5, 6]
    assert "2 lines cannot be read; their batches are computed again" in capsys.readouterr().out
    for batch in again.mine(7):
        again.add(batch, value=batch)
    assert [row["value"] for row in again.read().values()] == list(range(7)) and list(again.mine(7)) == []


def test_unreadable_lines_of_metrics_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path)
    for step in range(4):
        file.write(step, {"loss": 1 / (1 + step)})
    lines = path.read_bytes().split(b"\n")
    lines[2] = zlib.compress(b"loss" * 99).replace(b"\n", b"")
    path.write_bytes(b"\n".join(lines))
    assert unreadable(path) == 1 and [row["step"] for row in read_rows(path)] == [0, 2, 3]
    resumed = MetricsFile(path)
    resumed.write(3, {"loss": 0.125})
    assert [row["loss"] for row in read_rows(path)] == [1, pytest.approx(1 / 3), 0.125] and unreadable(path) == 0


def test_a_full_disk_raises_an_os_error(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    tensors = {"x": torch.zeros(100_000)}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(RuntimeError) as by_torch:
            AtomicCheckpointIO().save_checkpoint(tensors, tmp_path / "checkpoints" / "step=00000001.ckpt")
        with pytest.raises(SafetensorError) as by_safetensors:
            save_file(tensors, tmp_path / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for caught in (by_torch, by_safetensors):
        found = os_error(caught.value)
        assert found is not None and found.errno == errno.EFBIG
    assert os_error(RuntimeError("x (os error 28)")) is None
    assert not list((tmp_path / "checkpoints").iterdir())
