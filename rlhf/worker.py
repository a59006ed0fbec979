"""``python -m rlhf.worker FOLDER`` trains one prepared run folder in a process of its own.

Used for steps that train on several devices: Lightning starts the same command again for each rank, and that must
train this one step and not the whole pipeline.
"""

import os
import sys
from pathlib import Path

from rlhf import console, discovery, pipeline, processes
from rlhf.config import resolve
from rlhf.errors import RLHFError, RunFailed, UserError, first_line, os_error, os_error_line
from rlhf.runs import Run, write_json


def main(folder: Path) -> int:
    """Trains as the folder's config.yaml says; the first rank leaves metrics, or what went wrong, in .result.json."""
    if processes.end_with_parent():
        os.environ[processes.PARENT] = str(os.getpid())  # for the other ranks, which Lightning starts
    discovery.register()
    own = Run(folder)
    try:
        metrics, memory = pipeline.train_here(resolve(own.plain_config), folder, bool(own.checkpoints))
    except Exception as error:
        refused = os_error(error)
        if isinstance(error, RLHFError):
            line, status = str(error), error.exit_code
        elif refused is not None:
            line, status = f"{os_error_line(refused)}, then type it again", UserError.exit_code
        elif left_alone(error):
            line, status = f"another process ended ({first_line(error)}); it says why", RunFailed.exit_code
        else:
            raise
        if _first():  # who started it says it, with the keys of its pipeline
            write_json(folder / ".result.json", {"error": line, "status": status})
        else:
            print(f"error: {line}", file=sys.stderr)
        return status
    # Read only now: the first rank learns its number while it starts the others.
    if _first():
        write_json(folder / ".result.json", {"metrics": metrics, "memory": memory})
    return 0


def left_alone(error: Exception) -> bool:
    """Return whether an error says no more than that another process is gone, which has said why."""
    found = type(error).__name__ in ("DistBackendError", "DistNetworkError") or "gloo/" in str(error)
    return isinstance(error, RuntimeError) and found


def _first() -> bool:
    return int(os.environ.get("LOCAL_RANK", "0")) == 0 and int(os.environ.get("NODE_RANK", "0")) == 0


if __name__ == "__main__":
    with console.screen():
        sys.exit(main(Path(sys.argv[1])))
