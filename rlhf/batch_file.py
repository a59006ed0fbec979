"""Batches of work that a kill does not undo and that processes share: each finished one is a line on disk."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class BatchFile:
    """Results of numbered batches, one JSON line each, in a file per process.

    What a batch gives must be a function of its number alone: then who does it, and in which attempt, changes nothing.

    Args:
        folder: The run's folder.
        name: Names the files, ``NAME.part0.jsonl`` and so on.
        rank: This process.
        world_size: All processes; batch i belongs to process i modulo this.
    """

    def __init__(self, folder: Path, name: str, rank: int = 0, world_size: int = 1) -> None:
        self.folder, self.name, self.rank, self.world_size = folder, name, rank, world_size
        self.path = folder / f"{name}.part{rank}.jsonl"
        if self.path.exists():
            # A line cut short by a kill goes, so that what follows starts on a new one. Cut, not written anew: the
            # other processes may be reading.
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
        self.done = set(self.read())
        broken = _rows(self.path).count(None) if self.path.exists() else 0
        if broken:
            print(f"  {self.path}: {broken} lines cannot be read; their batches are computed again", flush=True)

    def read(self) -> dict[int, dict[str, Any]]:
        """Return every finished batch of all processes and attempts, by its number, in order.

        A line that cannot be read, as a power loss may leave one, is a batch that is still to be done.
        """
        rows = [row for file in self.folder.glob(f"{self.name}.part*.jsonl") for row in _rows(file) if row is not None]
        return {row["batch"]: row for row in sorted(rows, key=lambda row: int(row["batch"]))}

    def mine(self, count: int) -> Iterator[int]:
        """The batches below ``count`` that this process still has to do."""
        return (index for index in range(self.rank, count, self.world_size) if index not in self.done)

    def add(self, batch: int, **row: Any) -> None:
        """Writes down a finished batch."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"batch": batch, **row}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done.add(batch)

    def remove(self) -> None:
        """Removes the files of all processes, once what was made of them is whole."""
        for file in self.folder.glob(f"{self.name}.part*.jsonl"):
            file.unlink(missing_ok=True)


def _rows(file: Path) -> list[dict[str, Any] | None]:
    """Return the rows of a file, None for each line that cannot be read; what follows the last newline is cut short."""
    found: list[dict[str, Any] | None] = []
    for line in file.read_bytes().split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        whole = isinstance(row, dict) and type(row.get("batch")) is int
        found.append(row if whole else None)
    return found
