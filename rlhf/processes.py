"""Processes that a command starts for its work: they end with it, however it ends. Standard library only."""

import ctypes
import os
import signal
import sys

from rlhf.discovery import DIRECTORY

PARENT = "RLHF_PARENT"  # names, to a process that is started, the process that started it
_PR_SET_PDEATHSIG = 1


def environment(directory: str | None = None) -> dict[str, str]:
    """Return what a process to be started has to find in its environment.

    Args:
        directory: Where the command was typed; by default the directory of this process.
    """
    return {PARENT: str(os.getpid()), DIRECTORY: os.environ.get(DIRECTORY) or directory or os.getcwd()}


def end_with_parent() -> bool:
    """Let SIGTERM end this process once the one that started it is gone, as at `kill -9`; first a checkpoint is saved.

    Linux alone can do that. Returns whether a command of ours started this process; nothing happens to others.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is None or not sys.platform.startswith("linux"):
        return parent is not None
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if str(os.getppid()) != parent:  # it ended before the call above
        raise SystemExit(128 + signal.SIGTERM)
    return True
