"""File locks: held by a process and released when it ends, however it ends, on any host. Standard library only.

They use flock(2), which is supported by local file systems, and by NFS from version 4 on unless it is mounted with
`local_lock`. On a file system without locks nothing is locked, and one line warns of it.
"""

import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_PATIENCE = 0.1  # seconds to retry before a lock counts as held: `is_locked` acquires it for an instant


class Locked(Exception):
    """Error: another process holds the lock."""


@contextmanager
def lock(path: Path, wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock of a file inside the context; the file is created if it does not exist.

    Args:
        path: File that serves as the lock; it is not removed.
        wait: Called once if another process holds the lock, before this process waits for as long as needed.

    Raises:
        Locked: If another process holds the lock and `wait` is None.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            if not _acquire(file):
                if wait is None:
                    raise Locked(str(path))
                wait()
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_same_file(file, path):  # its directory was removed meanwhile, and possibly recreated
                continue
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: a forked process may still have the file open
            return


def is_locked(path: Path) -> bool | None:
    """Return whether a process holds the lock of a file; None if the file system has no locks."""
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
                "twice at the same time, or type another directory as outputs=DIRECTORY",
                file=sys.stderr,
            )
            return True


def _is_same_file(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
