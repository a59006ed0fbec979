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
    """Context manager: raise UserError with ``problem`` if the block takes longer than this many seconds.

    It uses SIGALRM, so it works in the main thread alone and does nothing in others. A timer that is running already
    goes on afterwards; one that ends earlier is left to run.
    """
    outer = signal.getitimer(signal.ITIMER_REAL)[0]
    if threading.current_thread() is not threading.main_thread() or 0 < outer <= seconds:
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise UserError(problem)

    before = signal.signal(signal.SIGALRM, late)
    started = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - started), 1e-3) if outer else 0)
