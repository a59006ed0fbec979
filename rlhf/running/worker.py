"""Worker: ``python -m rlhf.running.worker DIRECTORY`` trains one prepared run directory in a separate process.

It is used for steps that train on several devices: Lightning starts the same command again for each rank, and that
command must train this one step and not the whole pipeline.
"""

import os
import sys
from pathlib import Path

from rlhf import console, discovery
from rlhf.errors import (
    CHECK_PATH,
    RLHFError,
    RunFailed,
    UserError,
    error_fields,
    first_line,
    os_error,
    os_error_problem,
)
from rlhf.planning.step_config import resolve
from rlhf.running import pipeline, processes
from rlhf.runs.run_directory import Run
from rlhf.storage.files import write_json


def main(folder: Path) -> int:
    """Train the run of the directory's config.yaml; rank 0 writes the metrics, or the error, to .result.json."""
    if processes.end_with_parent():
        os.environ[processes.PARENT] = str(os.getpid())  # inherited by the other ranks, which Lightning starts
    discovery.register()
    own = Run(folder)
    try:
        metrics, memory = pipeline.train_here(resolve(own.plain_config), folder, bool(own.checkpoints))
    except Exception as error:
        refused = os_error(error)
        if isinstance(error, RLHFError):
            reported: RLHFError = error
        elif refused is not None:
            reported = UserError(os_error_problem(refused), f"{CHECK_PATH}, then type it again")
        elif is_lost_peer_error(error):
            reported = RunFailed(f"another rank ended ({first_line(error)})", "see the cause that it printed")
        else:
            raise
        if _first():  # the parent prints it, with the keys of its pipeline
            content = {"error": error_fields(reported), "status": reported.exit_code}
            write_json(folder / ".result.json", content)
        else:
            print(f"error: {reported}", file=sys.stderr)
        return reported.exit_code
    # Read only now: Lightning sets the rank of the first process while it starts the others.
    if _first():
        write_json(folder / ".result.json", {"metrics": metrics, "memory": memory})
    return 0


def is_lost_peer_error(error: Exception) -> bool:
    """Return whether an error only reports that another rank is gone; that rank has printed the cause."""
    # torch raises a plain RuntimeError for a lost gloo connection: only the source file in its text identifies it.
    found = type(error).__name__ in ("DistBackendError", "DistNetworkError") or "gloo/" in str(error)
    return isinstance(error, RuntimeError) and found


def _first() -> bool:
    return int(os.environ.get("LOCAL_RANK", "0")) == 0 and int(os.environ.get("NODE_RANK", "0")) == 0


if __name__ == "__main__":
    with console.screen():
        sys.exit(main(Path(sys.argv[1])))
