"""Time limit for code that a stranger's file brings, such as a chat template."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rlhf.errors import UserError


@contextmanager
def time_limit(seconds: float, problem: str) -> Iterator[None]:
    """Context manager: raise UserError with ``problem`` if the block takes longer than this many seconds of CPU time.

    Of the clock on the wall it would depend on what else the machine does, and so would a score that it bounds. It uses
    SIGPROF, so it works in the main thread alone and does nothing in others. A timer that is running already goes on
    afterwards; one that ends earlier is left to run.
    """
    outer = signal.getitimer(signal.ITIMER_PROF)[0]
    if threading.current_thread() is not threading.main_thread() or 0 < outer <= seconds:
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise UserError(problem)

    before = signal.signal(signal.SIGPROF, late)
    started = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        signal.setitimer(signal.ITIMER_PROF, max(outer - (time.process_time() - started), 1e-3) if outer else 0)
