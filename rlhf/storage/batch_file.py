"""Resumable batches of work shared by several ranks: each finished batch is a line on disk."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class BatchFile:
    """Results of numbered batches, one JSON line each, in one file per rank.

    The result of a batch must be a function of its number alone, so that neither the rank nor the attempt that computes
    it changes anything.

    Args:
        folder: The run directory.
        name: Prefix of the file names, ``NAME.part0.jsonl`` and so on.
        rank: Rank of this process.
        world_size: Number of processes; batch i belongs to rank i modulo this.
    """

    def __init__(self, folder: Path, name: str, rank: int = 0, world_size: int = 1) -> None:
        self.folder, self.name, self.rank, self.world_size = folder, name, rank, world_size
        self.path = folder / f"{name}.part{rank}.jsonl"
        if self.path.exists():
            # Remove a line cut short by a kill, so that the next one starts on a new line. The file is truncated, not
            # rewritten: other ranks may be reading it.
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
        self.done = set(self.read())
        broken = _rows(self.path).count(None) if self.path.exists() else 0
        if broken:
            print(f"  {self.path}: {broken} lines cannot be read; their batches are computed again", flush=True)

    def read(self) -> dict[int, dict[str, Any]]:
        """Return every finished batch of all ranks and attempts, by its number, in order.

        A line that cannot be read, as a power loss may leave one, counts as an unfinished batch.
        """
        rows = [row for file in self.folder.glob(f"{self.name}.part*.jsonl") for row in _rows(file) if row is not None]
        return {row["batch"]: row for row in sorted(rows, key=lambda row: int(row["batch"]))}

    def mine(self, count: int) -> Iterator[int]:
        """Yield the batches below ``count`` that this rank still has to compute."""
        return (index for index in range(self.rank, count, self.world_size) if index not in self.done)

    def add(self, batch: int, **row: Any) -> None:
        """Append a finished batch to the file and flush it to the disk."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"batch": batch, **row}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done.add(batch)

    def remove(self) -> None:
        """Remove the files of all ranks, once the result made from them is complete."""
        for file in self.folder.glob(f"{self.name}.part*.jsonl"):
            file.unlink(missing_ok=True)


def _rows(file: Path) -> list[dict[str, Any] | None]:
    """Return the rows of a file, None for each unreadable line; text after the last newline is ignored."""
    found: list[dict[str, Any] | None] = []
    for line in file.read_bytes().split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        whole = isinstance(row, dict) and type(row.get("batch")) is int
        found.append(row if whole else None)
    return found
