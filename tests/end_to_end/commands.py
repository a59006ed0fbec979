"""Command lines run to their end, or to a signal, each in its own process.

`python -m rlhf.cli` spends most of a tiny run on importing torch and Lightning. Commands are therefore forked from a
server process that has imported them already; each is still a process with its own directory, output, signals and
status.
"""

import hashlib
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PRELOAD = [
    "rlhf.running.build",
    "rlhf.cli.main",
    "rlhf.evaluation.compare",
    "rlhf.running.pipeline",
    *(f"{path.parent.name}.stage" for path in sorted((ROOT / "plugins").glob("*/stage.py"))),
    # What a command imports only when it needs it.
    *(
        "hydra._internal.core_plugins",
        "rlhf.callbacks.signals",
        "rlhf.cli.help",
        "rlhf.running.curves",
        "rlhf.running.job",
    ),
    *("peft", "bitsandbytes", "matplotlib.pyplot", "rlhf.models.gguf", "transformers.generation.utils"),
    *("transformers.models.llama.modeling_llama", "transformers.processing_utils"),
    "tests.end_to_end.frozen",
]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "THP_MEM_ALLOC_ENABLE": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "plugins")]),
}
PATIENCE = 120.0  # seconds until a command without output is considered hung


@dataclass(frozen=True)
class Done:
    """Result of a finished command: its exit status (negative: a signal), and its output."""

    status: int
    out: str
    err: str

    @property
    def plan(self) -> str:
        """Return the steps that the output names, in order."""
        return next((line for line in self.out.splitlines() if line.startswith("plan:")), "")


class Command:
    """Running command line in ``folder``."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.screen = folder / f".screen.{time.monotonic_ns()}"
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=_work, args=(words, str(folder), str(self.screen)))
        self.process.start()

    @property
    def out(self) -> str:
        """Return the standard output so far."""
        path = self.screen.with_suffix(f"{self.screen.suffix}.out")
        return path.read_text(errors="replace") if path.exists() else ""

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait until a condition holds while the command is running."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.is_alive(), f"ended early, with status {self.process.exitcode}:\n{self.out}"
            assert time.monotonic() < deadline, f"nothing happened:\n{self.out}"
            time.sleep(0.002)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, patience: float = PATIENCE) -> Done:
        """Wait for the end, for at most `patience` seconds."""
        self.process.join(patience)
        assert self.process.exitcode is not None, f"hangs:\n{self.out}"
        err = self.screen.with_suffix(f"{self.screen.suffix}.err").read_text(errors="replace")
        return Done(self.process.exitcode, self.out, err)

    def kill(self) -> None:
        """Kill the process if it still runs."""
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _work(words: list[str], folder: str, screen: str) -> None:
    """Run ``python -m rlhf.cli WORDS`` in ``folder``, in the child process."""
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{screen}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = [str(ROOT / "rlhf/cli/__main__.py"), *words]
    status = importlib.import_module("rlhf.cli.main").run(words)
    sys.stdout.flush()
    sys.stderr.flush()
    # Atexit handlers of libraries belong to the server, not to its fork.
    os._exit(status)


def start_server() -> None:
    """Start the process that commands are forked from; it ends with this one."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def shell(folder: Path, *words: str) -> Done:
    """Run the command as a user types it, in a fresh interpreter."""
    return interpreter(folder, "-m", "rlhf.cli", *words)


def interpreter(folder: Path, *words: str) -> Done:
    """Run a fresh Python interpreter with these arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    return Done(done.returncode, done.stdout, done.stderr)


# Files on disk


def runs(outputs: Path) -> set[Path]:
    """Return every run directory below an outputs directory."""
    return {path.parent for path in outputs.glob("*/*/status.json")}


def stages(folders: set[Path]) -> list[str]:
    """Return the stages of run directories, sorted."""
    return sorted(folder.parent.name for folder in folders)


def status(folder: Path) -> dict[str, Any]:
    """Return status.json of a run."""
    content = json.loads((folder / "status.json").read_text())
    assert isinstance(content, dict)
    return content


def digests(folders: set[Path]) -> dict[str, str]:
    """Return hashes of what must not change when a run is reused: its status and all files of its model directory."""
    files = [path for folder in folders for path in (folder / "status.json", *folder.glob("model/*"))]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def first(outputs: Path, stage: str) -> Path:
    """Return the oldest run of a stage: the shared pipeline's, whatever later tests have trained beside it."""
    return min((outputs / stage).iterdir(), key=lambda folder: (folder / "status.json").stat().st_mtime)


def only(outputs: Path, stage: str) -> Path:
    """Return the only run of a stage."""
    (folder,) = (outputs / stage).iterdir()
    return folder
