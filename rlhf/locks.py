"""Locks of files: held by a process, and gone with it, however it ends and on whatever host. Standard library only.

They are those of flock(2), which local file systems have, and NFS from version 4 on unless it is mounted with
`local_lock`. Where a file system has none, nothing is locked, and one line warns of it.
"""

import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_PATIENCE = 0.1  # seconds to try before somebody else is taken to hold a lock: `is_locked` takes it for an instant


class Locked(Exception):
    """Another process holds the lock."""


@contextmanager
def lock(path: Path, wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock of a file, which is made if it is not there.

    Args:
        path: File that serves as the lock; it stays.
        wait: Called once if another process holds it, before this one waits for as long as that takes.

    Raises:
        Locked: Another process holds it, and `wait` is None.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            if not _acquire(file):
                if wait is None:
                    raise Locked(str(path))
                wait()
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _lies_at(file, path):  # its folder was removed meanwhile, and maybe made anew
                continue
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # a process that was forked meanwhile may have the file open still
            return


def is_locked(path: Path) -> bool | None:
    """Whether a process holds the lock of a file; None where the file system has no locks."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return False


def _acquire(file: IO[bytes]) -> bool:
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        except OSError as error:
            print(
                f"warning: {file.name}: this file system has no locks ({error.strerror}); do not type the same command "
                "twice at the same time, or name another folder with outputs=",
                file=sys.stderr,
            )
            return True


def _lies_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
