"""Limits of time and memory for code from untrusted files, such as a chat template."""

import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rlhf.errors import UserError


@contextmanager
def time_limit(seconds: float, error: UserError) -> Iterator[None]:
    """Context manager: raise an error if the block takes longer than this many seconds of CPU time.

    Wall-clock time would depend on the load of the machine, and so would a score that it bounds. The limit uses
    SIGPROF, so it works in the main thread only and has no effect in others. A timer that is already running continues
    afterwards; one that would expire earlier is left in place, and no limit is set.

    Args:
        seconds: Limit in seconds of CPU time.
        error: The error to raise.
    """
    outer = signal.getitimer(signal.ITIMER_PROF)[0]
    if threading.current_thread() is not threading.main_thread() or 0 < outer <= seconds:
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise error

    before = signal.signal(signal.SIGPROF, late)
    started = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        signal.setitimer(signal.ITIMER_PROF, max(outer - (time.process_time() - started), 1e-3) if outer else 0)


@contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Context manager: raise MemoryError if the process would allocate this many bytes more than it has.

    It limits the address space of the process, on Linux and in the main thread only; elsewhere it has no effect.
    """
    if threading.current_thread() is not threading.main_thread() or not sys.platform.startswith("linux"):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    lower = [limit for limit in before if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([taken + size, *lower]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
