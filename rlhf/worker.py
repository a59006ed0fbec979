"""``python -m rlhf.worker FOLDER`` trains one prepared run folder in a process of its own.

Used for steps that train on several devices: Lightning starts the same command again for each rank, and that must
train this one step and not the whole pipeline.
"""

import os
import sys
from pathlib import Path

from rlhf import console, discovery, pipeline, processes
from rlhf.config import resolve
from rlhf.errors import RLHFError, UserError, os_error, os_error_line
from rlhf.runs import Run, write_json


def main(folder: Path) -> int:
    """Trains as the folder's config.yaml says; the first rank leaves metrics, or what went wrong, in .result.json."""
    if processes.end_with_parent():
        os.environ[processes.PARENT] = str(os.getpid())  # for the other ranks, which Lightning starts
    discovery.register()
    own = Run(folder)
    try:
        metrics, memory = pipeline.train_here(resolve(own.plain_config), folder, bool(own.checkpoints))
    except RLHFError as error:
        if _first():  # who started it says it, with the keys of its pipeline
            write_json(folder / ".result.json", {"error": str(error), "status": error.exit_code})
        else:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if (refused := os_error(error)) is None:
            raise
        line = f"{os_error_line(refused)}; check the path, its permissions and the free space, then type it again"
        if _first():
            write_json(folder / ".result.json", {"error": line, "status": UserError.exit_code})
        else:
            print(f"error: {line}", file=sys.stderr)
        return UserError.exit_code
    # Read only now: the first rank learns its number while it starts the others.
    if _first():
        write_json(folder / ".result.json", {"metrics": metrics, "memory": memory})
    return 0


def _first() -> bool:
    return int(os.environ.get("LOCAL_RANK", "0")) == 0 and int(os.environ.get("NODE_RANK", "0")) == 0


if __name__ == "__main__":
    with console.screen():
        sys.exit(main(Path(sys.argv[1])))
