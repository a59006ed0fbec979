"""Sequences on disk, which replace lists in memory when data are streamed.

Order, length and items are the same as those of lists.
"""

import pickle
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from os import pread
from typing import Any, TypeVar, overload

from rlhf.storage.cache import cache_folder

T = TypeVar("T")


class OnDisk(Sequence[T]):
    """Sequence whose items are read on access."""


class DiskList(OnDisk[T]):
    """Items in an unnamed file that is deleted with the process; 16 bytes of memory per item.

    The file is in the cache directory (RLHF_CACHE), not in the directory for temporary files, which is in memory on
    many machines.
    """

    def __init__(self, items: Iterable[T]) -> None:
        self._file = tempfile.TemporaryFile(dir=cache_folder("streams"))  # noqa: SIM115  # closed with the list
        self._ends = array("Q", [0])
        self.lengths = array("Q")  # len() of each item, 0 for items without a length
        for item in items:
            content = pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
            self._file.write(content)
            self._ends.append(self._ends[-1] + len(content))
            self.lengths.append(len(item) if hasattr(item, "__len__") else 0)  # type: ignore[arg-type]
        self._file.flush()

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> "View[T]": ...
    def __getitem__(self, index: int | slice) -> "T | View[T]":
        if isinstance(index, slice):
            return View(self, range(len(self))[index])
        place = range(len(self))[index]  # counts from the end where negative, raises IndexError
        start, end = self._ends[place], self._ends[place + 1]
        found: T = pickle.loads(pread(self._file.fileno(), end - start, start))
        return found


class View(OnDisk[T]):
    """Selected items of another sequence in a given order, without a copy."""

    def __init__(self, items: Sequence[T], places: Sequence[int]) -> None:
        self._items, self._places = items, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> "View[T]": ...
    def __getitem__(self, index: int | slice) -> "T | View[T]":
        if isinstance(index, slice):
            return View(self._items, self._places[index])
        return self._items[self._places[index]]

    def __iter__(self) -> Iterator[T]:
        return (self._items[place] for place in self._places)


class Chain(OnDisk[T]):
    """Concatenation of several sequences, without a copy."""

    def __init__(self, parts: Sequence[Sequence[T]]) -> None:
        self._parts = list(parts)

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> View[T]: ...
    def __getitem__(self, index: int | slice) -> T | View[T]:
        if isinstance(index, slice):
            return View(self, range(len(self))[index])
        place = range(len(self))[index]
        for part in self._parts:
            if place < len(part):
                return part[place]
            place -= len(part)
        raise IndexError(index)


def store_like(items: Iterable[T], like: Sequence[Any]) -> Sequence[T]:
    """Return the items as a sequence: on disk if `like` is, else in memory."""
    return DiskList(items) if isinstance(like, OnDisk) else list(items)


def lengths(items: Sequence[Any]) -> Sequence[int]:
    """Return len() of each item, without reading items on disk."""
    return items.lengths if isinstance(items, DiskList) else [len(item) for item in items]
