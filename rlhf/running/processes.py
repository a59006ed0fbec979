"""Child processes of a command, which end with it however it ends. Standard library only."""

import ctypes
import os
import signal
import sys

from rlhf.discovery import DIRECTORY

PARENT = "RLHF_PARENT"  # environment variable: process id of the process that started this one
RESULT = "RLHF_RESULT"  # environment variable: file to which a job of a sweep writes its result
INTERRUPTED = 75  # exit status of a run that stopped on a signal and can be resumed (EX_TEMPFAIL)
_PR_SET_PDEATHSIG = 1


def environment(directory: str | None = None) -> dict[str, str]:
    """Return the environment variables that a child process needs.

    Args:
        directory: Where the command was typed; by default the directory of this process.
    """
    return {PARENT: str(os.getpid()), DIRECTORY: os.environ.get(DIRECTORY) or directory or os.getcwd()}


def end_with_parent() -> bool:
    """Have the kernel send SIGTERM to this process when its parent ends, even by `kill -9`.

    SIGTERM saves a checkpoint before it ends the process. Only Linux supports this.

    Returns:
        Whether a command of ours started this process; for any other process nothing is changed.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is None or not sys.platform.startswith("linux"):
        return parent is not None
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if str(os.getppid()) != parent:  # the parent ended before the call above
        raise SystemExit(128 + signal.SIGTERM)
    return True
