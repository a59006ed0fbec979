"""Cache of results that can be recomputed: models converted from GGUF, streamed training data, digests of code."""

import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from rlhf.errors import UserError

T = TypeVar("T")


class Once:
    """In-memory cache that is active while ``open``, for commands that request the same result many times."""

    def __init__(self, name: str) -> None:
        self._kept: ContextVar[dict[Hashable, Any] | None] = ContextVar(name, default=None)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Compute each result once inside the outermost context, and drop all results at its end."""
        kept = self._kept.get()
        token = self._kept.set({} if kept is None else kept)
        try:
            yield
        finally:
            self._kept.reset(token)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the result kept under a key, computing it if needed; outside of ``open``, compute it every time."""
        kept = self._kept.get()
        if kept is None:
            return make()
        if key not in kept:
            kept[key] = make()
        found: T = kept[key]
        return found


def cache_home() -> Path:
    """Return the directory of the cache: RLHF_CACHE, else rlhf in XDG_CACHE_HOME, else ~/.cache/rlhf."""
    own = os.environ.get("RLHF_CACHE")
    home = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "rlhf"
    return home.expanduser()


def cache_folder(name: str) -> Path:
    """Return a directory in ``cache_home``, created if needed.

    Raises:
        UserError: If the directory cannot be created.
    """
    folder = cache_home() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be created ({error.strerror})", fix="type RLHF_CACHE=DIRECTORY before the command"
        ) from error
    return folder


def mark_used(path: Path) -> None:
    """Set the time of an entry to now, which `rlhf cache` reports as its last use; a read-only cache stays as it is."""
    with suppress(OSError):
        os.utime(path)


def recall(name: str, key: str) -> str | None:
    """Return the text stored under a key in a directory of the cache; None if it is missing or unreadable."""
    with suppress(OSError, UnicodeDecodeError, UserError):
        return (cache_folder(name) / key).read_text(encoding="utf-8")
    return None


def remember(name: str, key: str, text: str) -> None:
    """Store a text under a key atomically; do nothing if the cache cannot be written."""
    with suppress(OSError, UserError):
        file = cache_folder(name) / key
        scratch = file.with_name(f".{key}.{os.getpid()}")
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, file)
