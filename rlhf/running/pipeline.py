"""Execution of a plan: finished steps are reused, interrupted ones resumed, the others trained. ``run`` is the entry.

A single stage is a pipeline of one step. torch is imported only when a step runs.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import hydra.utils
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from rlhf import console
from rlhf.console import shell
from rlhf.errors import CHECK_PATH, RLHFError, RunFailed, UserError, error_from_fields, os_error, os_error_problem
from rlhf.planning import comparison_file
from rlhf.planning.checks.memory import check_memory
from rlhf.planning.comparison_file import Comparison
from rlhf.planning.plan import plan
from rlhf.planning.step import Plan, Step
from rlhf.planning.step_config import name_in_step
from rlhf.running import processes
from rlhf.running.summary import command, peak_memory, reset_peak_memory, summary
from rlhf.running.versions import differing, untested
from rlhf.runs import fingerprint, run_directory
from rlhf.runs.run_directory import Run
from rlhf.stage.strategies import is_sharded
from rlhf.storage import checkpoint_files, files, manifest
from rlhf.storage.metrics_file import unreadable
from rlhf.storage.plain import Plain


def run(root: DictConfig, overrides: Sequence[str] | None = None) -> float | None:
    """Run a stage or a pipeline: reuse finished steps, resume interrupted ones, train the others.

    Args:
        root: the composed config.
        overrides: the typed overrides; by default Hydra's.

    Returns:
        The headline metric of the last step, for sweepers; None if its stage names none.

    Raises:
        UserError: before anything is trained, if the command has to be changed.
        RunFailed: a step started and did not finish.
    """
    if overrides is None:
        overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    made = plan(root, overrides)
    if _main_process() and (line := untested()) is not None:
        print(line, file=sys.stderr)
    for note in made.notes if _main_process() else ():
        console.say(note, "yellow")
    if _main_process() and (len(made.steps) > 1 or made.skipped):
        console.say(console.format_plan([step.name for step in made.steps], made.skipped), "bold")
    check_memory(made.steps)
    outcomes = []
    last: Plain = {}
    for position, step in enumerate(made.steps, 1):
        try:
            how, last = _run_step(step, f"[{position}/{len(made.steps)}] {step.name}")
        except BaseException as error:
            if isinstance(error, RLHFError):
                name_in_step(error, step.own, step.name)
            _write_result(step, "stopped" if isinstance(error, SystemExit | KeyboardInterrupt) else "failed", {}, error)
            raise
        outcomes.append((step.name, step.folder, how, last, step.headline))
    value = last.get("value")
    if _main_process():
        compared = _compare(made)
        console.end(outcomes, _reads(made))
        if compared is not None:
            _print_comparison(made, compared)
        console.print_next_commands(_next(made))
        _write_result(made.steps[-1], "finished", last, extra=compared.metrics if compared is not None else {})
    return value


def _main_process() -> bool:
    """Return whether this process is rank 0, the one that writes; torchrun and similar tools start one per rank."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


def _run_step(step: Step, label: str) -> tuple[str, Plain]:
    """Run or find one step; return "ran", "resumed" or "reused", and its summary."""
    own = Run(step.folder)
    if not _main_process():
        if not own.finished:
            step.folder.mkdir(parents=True, exist_ok=True)
            train_here(step.config, step.folder, bool(own.checkpoints))
        return "ran", {}
    if own.finished:
        made_with = own.summary.get("versions")
        others = differing(made_with) if isinstance(made_with, Mapping) else ""
        console.say(f"{label}  {step.folder}  reused{others}", "dim")
        return "reused", own.summary

    def wait() -> None:
        other = own.status_file
        console.say(f"{label}  {step.folder}  waits for process {other.get('pid', '?')}, which is computing it")

    with own.lock(wait):
        if _restored(step, own, label):
            return "reused", own.summary
        if own.last_status == "finished":
            console.say(f"{label}  {step.folder}  computed meanwhile by another process", "dim")
            return "reused", own.summary
        return _train(step, own, label)


def _restored(step: Step, own: Run, label: str) -> bool:
    """Return whether all damage of a finished run was repaired; the plan restores its description, but not its results.

    Damaged results are removed, so that they are not mistaken for complete ones while they are computed again.
    """
    damage = own.damage() if own.last_status == "damaged" else {}
    for name, wrong in damage.items():
        console.say(f"{label}  {own.folder / name} {wrong}", "yellow")
    described = ("config.yaml", "lineage.json")
    if damage and damage.keys() <= set(described):
        own.describe(step.config, _lineage(step))
        manifest.write(own.folder, [own.folder / name for name in described], add=True)
        console.say(f"{label}  {step.folder}  reused", "dim")
        return True
    torn = [own.folder / name for name in damage if name != manifest.FILE]
    for path in own.folder.glob("*.jsonl") if manifest.FILE in damage else torn:
        if path.exists():
            run_directory.remove(path)
    return False


def _train(step: Step, own: Run, label: str) -> tuple[str, Plain]:
    """Train one step in its locked run directory and record the outcome."""
    earlier = own.last_status
    whole, torn = checkpoint_files.newest_whole(step.folder)
    resume = whole is not None
    for path, wrong in torn.items():
        instead = "starts again from the beginning" if whole is None else f"resumes from {whole.name}"
        console.say(f"{label}  {path}: {wrong}; {instead}", "yellow")
        checkpoint_files.remove(path)
    if resume and (broken := unreadable(step.folder / "metrics.csv")):
        console.say(f"{label}  {step.folder / 'metrics.csv'}: {broken} lines cannot be read and are left out", "yellow")
    if not resume:
        own.clear()
    how = "resumed" if resume else "ran"
    again = "" if earlier in ("new", "finished") else f" (was {earlier})"
    lineage = _lineage(step)
    if earlier == "new" and (other := _of_other_code(step, command(), lineage["code"])) is not None:
        again = f" a new run: {other.folder}, which this command made before, was made with other code"
    console.say(f"{label}  {step.folder}  {'resumes' if resume else 'starts'}{again}")
    own.begin(step.config, lineage, command())
    started = time.perf_counter()
    reset_peak_memory()
    try:
        if _several_processes(step.config):
            metrics, memory = _train_in_subprocess(step.folder)
        else:
            with _exit_on_sigterm():
                metrics, memory = train_here(step.config, step.folder, resume)
    except (SystemExit, KeyboardInterrupt):
        own.write_status("stopped", ended=run_directory.now())
        console.say(f"{label}  stopped; type the same command again to continue", "yellow")
        raise
    except BaseException as error:
        with suppress(OSError):  # the error may be a full disk
            own.write_status("failed", ended=run_directory.now(), error=f"{type(error).__name__}: {error}")
            (step.folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        if isinstance(error, RLHFError) or not isinstance(error, Exception):
            raise
        if (refused := os_error(error)) is not None:
            fix = f"{CHECK_PATH}, then type the same command again (traceback in {step.folder / 'error.txt'})"
            raise UserError(os_error_problem(refused), fix, where=step.name) from error
        lines = str(error).strip().splitlines() or [""]
        details = f"{type(error).__name__}: {lines[0]} (traceback in {step.folder / 'error.txt'})"
        raise RunFailed(f"failed with {details}", where=step.name) from error
    _draw(step.folder)
    result = summary(step, metrics, memory, time.perf_counter() - started, own.status_file.get("attempt", 1))
    files.write_json(step.folder / "summary.json", result)
    own.write_manifest()
    # Written last and atomically: from here on the run counts as finished.
    own.write_status("finished", ended=run_directory.now())
    console.say(f"{label}  {step.folder}  finished in {console.duration(result['wall_s'])}", "green")
    return how, result


def _draw(folder: Path) -> None:
    """Draw curves.png beside the metrics; a failure to draw does not fail the run."""
    from rlhf.running.curves import run_curves

    try:
        run_curves(folder)
    except (OSError, ValueError, RuntimeError) as error:
        console.say(f"  curves.png was not drawn: {error}", "yellow")


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Context manager: SIGTERM ends the process with status 75; in training, callbacks save a checkpoint first."""

    def stop(*_: Any) -> None:
        raise SystemExit(processes.INTERRUPTED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def train_here(config: Plain, folder: Path, resume: bool) -> tuple[dict[str, float], Plain]:
    """Train in this process; return the metrics and the peak memory in bytes."""
    from rlhf.running.build import train

    try:
        metrics = dict(train(OmegaConf.create(config), folder, resume))
        return metrics, peak_memory()
    finally:
        gc.collect()  # free the memory for the next step of the pipeline


def _several_processes(config: Plain) -> bool:
    """Return whether Lightning will start further processes, each of which repeats the command of this one."""
    trainer = config.get("trainer") or {}
    single = str(trainer.get("devices", 1)) == "1" and int(trainer.get("num_nodes") or 1) == 1
    # A sharded stage on one device leaves a process group behind, which the next step must not find.
    return not (single and not is_sharded(trainer)) and "RANK" not in os.environ


def _train_in_subprocess(folder: Path) -> tuple[dict[str, float], Plain]:
    """Train in a child process, which Lightning repeats for each rank; a later step starts from a clean state."""
    result = folder / ".result.json"
    result.unlink(missing_ok=True)
    typed_in = hydra.utils.get_original_cwd() if HydraConfig.initialized() else None
    environment = os.environ | processes.environment(typed_in)
    child = subprocess.Popen([sys.executable, "-m", "rlhf.running.worker", str(folder)], env=environment)
    # The terminal sends Ctrl-C to the child too; SIGTERM must be forwarded. Both end once the child has saved.
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT,)}
    previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        status = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if status == processes.INTERRUPTED:
        raise SystemExit(processes.INTERRUPTED)
    if status < 0 and -status in (signal.SIGINT, signal.SIGTERM):
        raise KeyboardInterrupt
    content = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    result.unlink(missing_ok=True)
    if "error" in content:
        raise error_from_fields(content["error"], UserError if content["status"] == UserError.exit_code else RunFailed)
    if status != 0 or not content:
        raise RunFailed(f"the processes that train {folder} ended with status {status}", "see their output above")
    return content["metrics"], content["memory"]


def _lineage(step: Step) -> Plain:
    """Return the content of lineage.json: the run, its inputs, and every ancestor with its own inputs."""
    ancestors: Plain = {}
    for name, folder in step.parents.items():
        lineage = Run(folder).lineage
        own = {key: lineage.get(key) for key in ("stage", "folder", "inputs", "parents")}
        own |= {"stage": Run(folder).stage, "folder": str(folder)}
        ancestors |= lineage.get("ancestors", {}) | {name: own}
    return {
        "fingerprint": step.fingerprint,
        "stage": step.stage,
        "folder": str(step.folder),
        "inputs": step.inputs,
        "parents": sorted(step.parents),
        "ancestors": ancestors,
        "code": fingerprint.code(step.config),
    }


def _of_other_code(step: Step, typed: str, own: Mapping[str, str]) -> Run | None:
    """Return a run that the same command made of this stage with other code; None if there is none.

    Args:
        step: Step that starts.
        typed: Its command.
        own: Digests of its code.
    """
    for path in sorted(step.folder.parent.glob("[!.]*/status.json")):  # a hidden directory is a removed run
        run = Run(path.parent)
        if run.status_file.get("command") == typed and run.lineage.get("code") != own:
            return run
    return None


def _reads(made: Plan) -> dict[str, list[str]]:
    """Return step -> the steps whose results it reads, in the order of the plan: the lineage of a pipeline's rounds."""
    names = {step.fingerprint: step.name for step in made.steps}
    read = {step.name: [name for key, name in names.items() if key in step.parents] for step in made.steps}
    return {name: steps for name, steps in read.items() if steps}


def _write_result(
    step: Step,
    status: str,
    last: Plain,
    error: BaseException | None = None,
    extra: Mapping[str, float] | None = None,
) -> None:
    """Write the outcome of this job for the launcher of a sweep."""
    path = os.environ.get(processes.RESULT)
    if not path or not _main_process():
        return
    result = {
        "value": last.get("value"),
        "run": str(step.folder),
        "status": status,
        "metrics": {**last.get("metrics", {}), **(extra or {})},
    }
    if error is not None:
        result["error"] = f"{type(error).__name__}: {error}"
    files.write_json(Path(path), result)


# -- after the last step --------------------------------------------------------------------------------------------


def _compare(made: Plan) -> Comparison | None:
    """Compare two policies on held-out prompts as the pipeline's `compare` specifies; None without a comparison."""
    node = made.compare
    if node is None:
        return None
    before, after = made.get(node["before"]), made.get(node["after"])
    scorer = made.get(node.get("reward_model"))
    assert before is not None and after is not None
    console.say(f"comparing {before.name} with {after.name} on held-out prompts")
    fingerprints = {role: step.fingerprint for role, step in zip(("before", "after"), (before, after), strict=True)}
    key = comparison_file.key(node, fingerprints | ({} if scorer is None else {"reward_model": scorer.fingerprint}))
    known = comparison_file.read(after.folder, key)
    if known is not None:
        return known
    from rlhf.evaluation.compare import compare

    apart = ("before", "after", "reward_model", "data", "text")
    hyperparameters = {name: value for name, value in node.items() if name not in apart}
    text = node.get("text")
    found = compare(
        before.folder / "model",
        after.folder / "model",
        hydra.utils.instantiate(OmegaConf.create(node["data"])),
        None if scorer is None else scorer.folder / "model",
        None if text is None else hydra.utils.instantiate(OmegaConf.create(text)),
        folder=after.folder,
        **hyperparameters,
    )
    samples = [(sample.prompt, sample.before, sample.after) for sample in found.samples]
    compared = Comparison(found.prompts, found.clusters, found.table(), samples, found.metrics())
    comparison_file.write(after.folder, key, compared)
    return compared


def _print_comparison(made: Plan, compared: Comparison) -> None:
    node = made.compare or {}
    what = f"{compared.prompts} held-out prompts (mean ± standard error over {compared.clusters} clusters)"
    title = f"{node['after']} against {node['before']}, {what}"
    console.print_table(title, ("metric", node["before"], node["after"], "difference"), compared.table)
    for prompt, before, after in compared.samples:
        console.say(f"prompt: {prompt}")
        console.say(f"  {node['before']}: {before}")
        console.say(f"  {node['after']}: {after}")


def _next(made: Plan) -> list[tuple[str, str]]:
    last = made.steps[-1].folder
    before = made.get(made.compare["before"]) if made.compare else None
    both = [before.folder, last] if before else [last]
    return [
        (shell("rlhf", "report", *both), "curves and tables"),
        (shell("rlhf", "runs", "show", last), "config, lineage, metrics"),
    ]
