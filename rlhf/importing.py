"""Import code that a config names: whatever its modules raise becomes an ordinary error. Standard library only."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class ModuleEnded(Exception):
    """A module tried to end the process while it was imported, by SystemExit or the like."""


@contextmanager
def contained() -> Iterator[None]:
    """Context manager around an import: SystemExit, GeneratorExit and the like of a module become `ModuleEnded`.

    sys.exit(0) in a module would look like success, and KeyboardInterrupt like a user's. One that the user's Ctrl-C
    caused passes: a signal came before it.
    """
    came: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    here = threading.current_thread() is threading.main_thread()  # the one that Ctrl-C interrupts
    watched = here and callable(before)  # where it is ignored, none comes

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if callable(before):
            before(number, frame)

    if watched:
        signal.signal(signal.SIGINT, note)
    try:
        yield
    except BaseException as error:
        by_user = isinstance(error, KeyboardInterrupt) and (came or not here)
        if isinstance(error, Exception) or by_user:
            raise
        raise ModuleEnded(f"the module raises {type(error).__name__}{f'({error})' if str(error) else ''}") from error
    finally:
        if watched:
            signal.signal(signal.SIGINT, before)
