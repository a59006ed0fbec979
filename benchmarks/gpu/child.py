"""Process of one check: ``python -m benchmarks.gpu.child CHECK JSON``. It writes the outcome to a file."""

import json
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.gpu.outcome import Context, Ended
from rlhf.storage.files import write_json

LAST_LINES = 12


def main(path: str) -> None:
    """Run a check and write its outcome.

    Args:
        path: File with the keys ``function``, ``arguments``, ``device``, ``small``, ``folder`` and ``outcome``.
    """
    task: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    write_json(Path(task["outcome"]), outcome(task))


def outcome(task: dict[str, Any]) -> dict[str, Any]:
    """Return the status of a check, its figures, and the last lines of its error."""
    try:
        module, _, name = task["function"].partition(":")
        context = Context(task["device"], task["small"], Path(task["folder"]))
        figures = getattr(import_module(module), name)(context, **task["arguments"])
    except Ended as error:
        return {"status": error.status, "figures": error.figures, "error": str(error).splitlines()}
    except Exception as error:
        lines = [line.rstrip() for line in traceback.format_exc().splitlines()]
        return {"status": "out of memory" if is_out_of_memory(error) else "failed", "error": lines[-LAST_LINES:]}
    return {"status": "passed", "figures": figures}


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the device's or the machine's memory was exhausted."""
    torch: Any = sys.modules.get("torch")
    return isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))


if __name__ == "__main__":
    main(sys.argv[1])
