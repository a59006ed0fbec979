"""Running a plan: what is finished is reused, what is broken is resumed, the rest is trained. ``run`` is the entry.

A single stage is a pipeline of one step. No torch here before a step runs.
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

from rlhf import checkpoint_files, comparison, manifest, processes, runs
from rlhf.comparison import Comparison
from rlhf.config import Plain, said_of_step
from rlhf.console import shell
from rlhf.errors import RLHFError, RunFailed, UserError, os_error, os_error_line
from rlhf.inspection.refusal import refuse_too_large
from rlhf.metrics_file import unreadable
from rlhf.plan import Plan, Step, plan
from rlhf.report import console
from rlhf.runs import Run
from rlhf.summary import command, peak_memory, reset_peak_memory, summary
from rlhf.versions import untested

RESULT = "RLHF_RESULT"  # names the file in which a job of a sweep leaves its result
INTERRUPTED = 75  # exit status of a run that was asked to stop and can go on (EX_TEMPFAIL)


def run(root: DictConfig, overrides: Sequence[str] | None = None) -> float | None:
    """Runs a stage or a pipeline; what is finished is reused, what is broken is resumed.

    Args:
        root: the composed config.
        overrides: what was typed; by default Hydra is asked.

    Returns the headline metric of the last step, for sweepers; None if its stage names none.

    Raises:
        UserError: before anything is trained, when something has to be typed differently.
        RunFailed: a step began and did not finish.
    """
    if overrides is None:
        overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    made = plan(root, overrides)
    if _main_process() and (line := untested()) is not None:
        print(line, file=sys.stderr)
    for note in made.notes if _main_process() else ():
        console.say(note, "yellow")
    if _main_process() and (len(made.steps) > 1 or made.skipped):
        console.say(console.plan_line([step.name for step in made.steps], made.skipped), "bold")
    refuse_too_large(made.steps)
    outcomes = []
    last: Plain = {}
    for position, step in enumerate(made.steps, 1):
        try:
            how, last = _run_step(step, f"[{position}/{len(made.steps)}] {step.name}")
        except BaseException as error:
            if isinstance(error, RLHFError):
                error.args = (said_of_step(str(error), step.own, step.name),)
            _leave_result(step, "stopped" if isinstance(error, SystemExit | KeyboardInterrupt) else "failed", {}, error)
            raise
        outcomes.append((step.name, step.folder, how, last, step.headline))
    value = last.get("value")
    if _main_process():
        compared = _compare(made)
        console.end(outcomes, _reads(made))
        if compared is not None:
            _print_comparison(made, compared)
        console.next_commands(_next(made))
        _leave_result(made.steps[-1], "finished", last, extra=compared.metrics if compared is not None else {})
    return value


def _main_process() -> bool:
    """Whether this is the process that writes; torchrun and the like start one per rank."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


def _run_step(step: Step, label: str) -> tuple[str, Plain]:
    """Runs or finds one step. Returns "ran", "resumed" or "reused", and its summary."""
    own = Run(step.folder)
    if not _main_process():
        if not own.finished:
            step.folder.mkdir(parents=True, exist_ok=True)
            train_here(step.config, step.folder, bool(own.checkpoints))
        return "ran", {}
    if own.finished:
        console.say(f"{label}  {step.folder}  reused", "dim")
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
    """Whether all damage of a finished run could be undone: what it is follows from the plan, its results do not.

    Results that are damaged are removed, so that none is taken for whole while they are computed again.
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
            runs.remove(path)
    return False


def _train(step: Step, own: Run, label: str) -> tuple[str, Plain]:
    """Trains one step in its locked folder and writes what became of it."""
    earlier = own.last_status
    whole, torn = checkpoint_files.newest_whole(step.folder)
    resume = whole is not None
    for path, wrong in torn.items():
        console.say(f"{label}  {path}: {wrong}; resumes from {whole and whole.name}", "yellow")
        checkpoint_files.remove(path)
    if resume and (broken := unreadable(step.folder / "metrics.csv")):
        console.say(f"{label}  {step.folder / 'metrics.csv'}: {broken} lines cannot be read and are left out", "yellow")
    if not resume:
        own.clear()
    how = "resumed" if resume else "ran"
    again = "" if earlier in ("new", "finished") else f" (was {earlier})"
    console.say(f"{label}  {step.folder}  {'resumes' if resume else 'starts'}{again}")
    own.begin(step.config, _lineage(step), command())
    started = time.perf_counter()
    reset_peak_memory()
    try:
        if _several_processes(step.config):
            metrics, memory = _in_own_processes(step.folder)
        else:
            with _stops_when_asked():
                metrics, memory = train_here(step.config, step.folder, resume)
    except (SystemExit, KeyboardInterrupt):
        own.write_status("stopped", ended=runs.now())
        console.say(f"{label}  stopped; type the same command again to go on", "yellow")
        raise
    except BaseException as error:
        with suppress(OSError):  # the error may be a full disk
            own.write_status("failed", ended=runs.now(), error=f"{type(error).__name__}: {error}")
            (step.folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        if isinstance(error, RLHFError) or not isinstance(error, Exception):
            raise
        if (refused := os_error(error)) is not None:
            raise UserError(
                f"{step.name}: {os_error_line(refused)}, then type the same command again "
                f"(traceback in {step.folder / 'error.txt'})"
            ) from error
        lines = str(error).strip().splitlines() or [""]
        raise RunFailed(
            f"{step.name} failed: {type(error).__name__}: {lines[0]} (traceback in {step.folder / 'error.txt'})"
        ) from error
    _draw(step.folder)
    result = summary(step, metrics, memory, time.perf_counter() - started, own.status_file.get("attempt", 1))
    runs.write_json(step.folder / "summary.json", result)
    own.write_manifest()
    # Last of all, and whole: from here on the run counts as finished.
    own.write_status("finished", ended=runs.now())
    console.say(f"{label}  {step.folder}  finished in {console.duration(result['wall_s'])}", "green")
    return how, result


def _draw(folder: Path) -> None:
    """Leaves curves.png beside the metrics; a run does not fail for want of a picture."""
    from rlhf.report.plots import run_curves

    try:
        run_curves(folder)
    except (OSError, ValueError, RuntimeError) as error:
        console.say(f"  no curves drawn: {error}", "yellow")


@contextmanager
def _stops_when_asked() -> Iterator[None]:
    """While it is open, SIGTERM ends the process with status 75; in training, callbacks save a checkpoint first."""

    def stop(*_: Any) -> None:
        raise SystemExit(INTERRUPTED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def train_here(config: Plain, folder: Path, resume: bool) -> tuple[dict[str, float], Plain]:
    """Trains in this process. Returns the metrics and the peak memory in bytes."""
    from rlhf.build import train

    try:
        metrics = dict(train(OmegaConf.create(config), folder, resume))
        return metrics, peak_memory()
    finally:
        gc.collect()  # the next step of a pipeline finds the memory free


def _several_processes(config: Plain) -> bool:
    """Whether Lightning will start more processes, each of which runs the command of this one again."""
    trainer = config.get("trainer") or {}
    single = str(trainer.get("devices", 1)) == "1" and int(trainer.get("num_nodes") or 1) == 1
    return not single and "RANK" not in os.environ


def _in_own_processes(folder: Path) -> tuple[dict[str, float], Plain]:
    """Trains in a process of its own, which Lightning repeats for each rank; a later step starts afresh."""
    result = folder / ".result.json"
    result.unlink(missing_ok=True)
    typed_in = hydra.utils.get_original_cwd() if HydraConfig.initialized() else None
    environment = os.environ | processes.environment(typed_in)
    child = subprocess.Popen([sys.executable, "-m", "rlhf.worker", str(folder)], env=environment)
    # Ctrl-C reaches the child by itself; a termination must be handed on, and both end when the child has saved.
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT,)}
    previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        status = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if status == INTERRUPTED:
        raise SystemExit(INTERRUPTED)
    if status < 0 and -status in (signal.SIGINT, signal.SIGTERM):
        raise KeyboardInterrupt
    content = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    result.unlink(missing_ok=True)
    if "error" in content:
        raise (UserError if content["status"] == UserError.exit_code else RunFailed)(content["error"])
    if status != 0 or not content:
        raise RunFailed(f"the processes that train {folder} ended with status {status}; see above")
    return content["metrics"], content["memory"]


def _lineage(step: Step) -> Plain:
    """The run, what it reads, and every ancestor with what that one reads."""
    ancestors: Plain = {}
    for fingerprint, folder in step.parents.items():
        lineage = Run(folder).lineage
        own = {key: lineage.get(key) for key in ("stage", "folder", "inputs", "parents")}
        own |= {"stage": Run(folder).stage, "folder": str(folder)}
        ancestors |= lineage.get("ancestors", {}) | {fingerprint: own}
    return {
        "fingerprint": step.fingerprint,
        "stage": step.stage,
        "folder": str(step.folder),
        "inputs": step.inputs,
        "parents": sorted(step.parents),
        "ancestors": ancestors,
    }


def _reads(made: Plan) -> dict[str, list[str]]:
    """Step -> the steps whose results it reads, in the order of the plan: the lineage of a pipeline's rounds."""
    names = {step.fingerprint: step.name for step in made.steps}
    read = {step.name: [name for key, name in names.items() if key in step.parents] for step in made.steps}
    return {name: steps for name, steps in read.items() if steps}


def _leave_result(
    step: Step,
    status: str,
    last: Plain,
    error: BaseException | None = None,
    extra: Mapping[str, float] | None = None,
) -> None:
    """Tells the launcher of a sweep how this job ended."""
    path = os.environ.get(RESULT)
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
    runs.write_json(Path(path), result)


# Afterwards


def _compare(made: Plan) -> Comparison | None:
    """Before against after on held-out prompts, as the pipeline's `compare` says; None where it says nothing."""
    node = made.compare
    if node is None:
        return None
    before, after = made.get(node["before"]), made.get(node["after"])
    scorer = made.get(node.get("reward_model"))
    assert before is not None and after is not None
    console.say(f"comparing {before.name} with {after.name} on held-out prompts")
    fingerprints = {role: step.fingerprint for role, step in zip(("before", "after"), (before, after), strict=True)}
    key = comparison.key(node, fingerprints | ({} if scorer is None else {"reward_model": scorer.fingerprint}))
    known = comparison.read(after.folder, key)
    if known is not None:
        return known
    from rlhf import evaluation

    apart = ("before", "after", "reward_model", "data", "text")
    knobs = {name: value for name, value in node.items() if name not in apart}
    text = node.get("text")
    found = evaluation.compare(
        before.folder / "model",
        after.folder / "model",
        hydra.utils.instantiate(OmegaConf.create(node["data"])),
        None if scorer is None else scorer.folder / "model",
        None if text is None else hydra.utils.instantiate(OmegaConf.create(text)),
        folder=after.folder,
        **knobs,
    )
    samples = [(sample.prompt, sample.before, sample.after) for sample in found.samples]
    compared = Comparison(found.prompts, found.clusters, found.table(), samples, found.metrics())
    comparison.write(after.folder, key, compared)
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
