"""Time limit for code that a stranger's file brings, such as a chat template."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rlhf.errors import UserError


@contextmanager
def time_limit(seconds: float, problem: str) -> Iterator[None]:
    """Context manager: raise UserError with ``problem`` if the block takes longer than this many seconds.

    It uses SIGALRM, so it works in the main thread alone and does nothing in others, nor inside another such block.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise UserError(problem)

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
