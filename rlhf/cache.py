"""Cache of what can be made again: models read from GGUF files, streams on their way to training, digests of code."""

import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from rlhf.errors import UserError

T = TypeVar("T")


class Once:
    """Keep results in memory while ``open``, for a command that asks for the same thing many times."""

    def __init__(self, name: str) -> None:
        self._kept: ContextVar[dict[Hashable, Any] | None] = ContextVar(name, default=None)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Context manager: each result is made once, and forgotten at the end."""
        token = self._kept.set({})
        try:
            yield
        finally:
            self._kept.reset(token)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the result kept under a key, made if need be; made each time where nothing is open."""
        kept = self._kept.get()
        if kept is None:
            return make()
        if key not in kept:
            kept[key] = make()
        found: T = kept[key]
        return found


def cache_folder(name: str) -> Path:
    """A folder of the cache, made if need be: in RLHF_CACHE, else in rlhf in XDG_CACHE_HOME, else in ~/.cache/rlhf."""
    own = os.environ.get("RLHF_CACHE")
    home = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "rlhf"
    folder = home.expanduser() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made ({error.strerror}); type RLHF_CACHE=FOLDER before the command"
        ) from error
    return folder


def recall(name: str, key: str) -> str | None:
    """Return the text kept under a key in a folder of the cache; None if there is none or the cache cannot be read."""
    with suppress(OSError, UnicodeDecodeError, UserError):
        return (cache_folder(name) / key).read_text(encoding="utf-8")
    return None


def remember(name: str, key: str, text: str) -> None:
    """Keep a text, whole or not at all; does nothing where the cache cannot be written."""
    with suppress(OSError, UserError):
        file = cache_folder(name) / key
        scratch = file.with_name(f".{key}.{os.getpid()}")
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, file)
