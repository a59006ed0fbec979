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

    def read(self) -> dict[int, dict[str, Any]]:
        """Every finished batch of all processes and attempts, by its number, in order."""
        found = {}
        for file in self.folder.glob(f"{self.name}.part*.jsonl"):
            for line in file.read_text(encoding="utf-8").split("\n")[:-1]:  # after the last newline: cut short
                row = json.loads(line)
                found[row["batch"]] = row
        return dict(sorted(found.items()))

    def mine(self, count: int) -> Iterator[int]:
        """The batches below ``count`` that this process still has to do."""
        return (index for index in range(self.rank, count, self.world_size) if index not in self.done)

    def add(self, batch: int, **row: Any) -> None:
        """Writes down a finished batch."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"batch": batch, **row}) + "\n")
        self.done.add(batch)

    def remove(self) -> None:
        """Removes the files of all processes, once what was made of them is whole."""
        for file in self.folder.glob(f"{self.name}.part*.jsonl"):
            file.unlink(missing_ok=True)
