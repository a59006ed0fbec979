"""Checks that run a command: the tests marked gpu, and stages with trainer=fsdp."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from benchmarks import models
from benchmarks.gpu.outcome import Context, Failed, Figures, Refused, Skipped
from rlhf.errors import UserError
from rlhf.storage.files import read_json

ROOT = Path(__file__).resolve().parents[2]
LAST_LINES = 12


def tests(context: Context) -> Figures:
    """Run the tests marked gpu. On a CPU all of them are skipped."""
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    report = context.folder / "tests.xml"
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    for kind in ("DeprecationWarning", "FutureWarning"):  # errors in this project; other versions may be installed here
        words += ["-W", f"ignore::{kind}"]
    words += files
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    figures: Figures = {"files": files}
    if report.is_file():
        suite = next(ElementTree.parse(report).iter("testsuite"))
        figures |= {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    if ended.returncode:
        raise Failed("\n".join((ended.stdout + ended.stderr).splitlines()[-LAST_LINES:]), figures)
    if figures.get("tests") == figures.get("skipped"):
        raise Skipped("all tests were skipped: there is no GPU", figures)
    return figures


def fsdp(context: Context) -> Figures:
    """Run SFT and DPO with ``trainer=fsdp`` on one device, and the same without it; compare the last losses."""
    policy = models.model_folder("tiny")
    figures: Figures = {}
    for stage in ("sft", "dpo"):
        losses = []
        for trainer in (context.trainer, "fsdp"):
            outputs = context.folder / f"{stage}-{trainer}"
            words = [
                f"stage={stage}",
                f"trainer={trainer}",
                *(["trainer.devices=1"] if trainer == "fsdp" else []),
                *(["trainer.accelerator=cpu"] if trainer == "fsdp" and context.device == "cpu" else []),
                f"inputs.policy={policy}",
                "recipe=testbed",
                "data.size=64",
                "data.validation=8",
                "stage.batch_size=8",
                "+trainer.limit_train_batches=4",
                "callbacks=quiet",
                f"outputs={outputs}",
            ]
            losses.append(_last_loss(words, outputs))
        figures[stage] = {"last_loss": losses[0], "last_loss_with_fsdp": losses[1]}
        if not abs(losses[1] - losses[0]) <= 1e-3 * abs(losses[0]):
            raise Failed(f"{stage}: the losses differ", figures)
    return figures


def _last_loss(words: list[str], outputs: Path) -> float:
    """Run ``rlhf`` and return the last training loss.

    Raises:
        Refused: The command is refused.
        Failed: The command failed.
    """
    command = [sys.executable, "-m", "rlhf.cli", *words]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False)
    last = "\n".join((ended.stdout + ended.stderr).splitlines()[-LAST_LINES:])
    if ended.returncode == UserError.exit_code:
        raise Refused(last)
    if ended.returncode:
        raise Failed(last)
    (summary,) = outputs.glob("*/*/summary.json")
    return float(read_json(summary)[0]["metrics"]["loss"])
