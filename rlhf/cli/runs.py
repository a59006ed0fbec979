"""List, show, check and remove runs: rlhf runs list | show RUN | check [RUN...] | rm RUN..."""

import os
import re
from contextlib import suppress
from pathlib import Path

from omegaconf import OmegaConf

from rlhf import console
from rlhf.cli import options
from rlhf.console import shell
from rlhf.errors import UserError, UserErrors, suggest
from rlhf.planning.references import find_runs_by_prefix
from rlhf.runs import run_files
from rlhf.runs.run_directory import Run, find, is_run_directory, remove
from rlhf.storage import manifest
from rlhf.storage.locks import Locked

STATUSES = ("finished", "running", "killed", "stopped", "failed", "damaged")
REMOVED = ".removed-"  # name prefix of a run directory that is being deleted


def main(argv: list[str]) -> int:
    """Run the sub-command; return its exit status."""
    parser = options.Parser(prog="rlhf runs", description="List, show, check and remove runs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|show|check|rm")
    lists = commands.add_parser("list", help="list all runs: status, main metric, time, directory")
    lists.add_argument("--stage", help="only runs of this stage")
    lists.add_argument("--status", choices=STATUSES, help="only runs in this state")
    shows = commands.add_parser("show", help="print a run: status, inputs, ancestors, metrics, config")
    shows.add_argument("run", metavar="RUN", help="run directory, or the first letters of its fingerprint")
    checks = commands.add_parser("check", help="compare the files of finished runs with the hashes in their manifests")
    checks.add_argument(
        "runs", nargs="*", metavar="RUN", help="run directory, or the first letters of its fingerprint [all]"
    )
    removes = commands.add_parser("rm", help="remove runs; those that other runs were made from need --force")
    removes.add_argument(
        "runs", nargs="*", metavar="RUN", help="run directory, or the first letters of its fingerprint"
    )
    removes.add_argument("--unfinished", action="store_true", help="also every failed, killed or stopped run")
    removes.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    removes.add_argument("--force", action="store_true", help="remove runs that other runs were made from")
    for command in (lists, shows, checks, removes):
        options.outputs(command)
    args = parser.parse_args(argv)
    if args.command == "list":
        return list_runs(args.outputs, args.stage, args.status)
    if args.command == "show":
        return show(named(args.run, args.outputs))
    if args.command == "check":
        return check([named(ref, args.outputs) for ref in args.runs] or find(args.outputs))
    return remove_runs(args.outputs, args.runs, args.unfinished, args.yes, args.force)


def named(ref: str, outputs: Path) -> Run:
    """Return the one run that a directory, the beginning of its path, or the first letters of a fingerprint select.

    Raises:
        UserError: no run or more than one is selected.
    """
    path = Path(ref)
    if ref and (path / "status.json").exists():
        return Run(path)
    found = find_runs_by_prefix(path, outputs) if ref.strip() else []
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(str(run.folder) for run in found[:5])
        raise UserError(f"{ref} matches more than one run: {names}", fix="type more letters")
    problem = f"{ref or repr(ref)}: no such run in {outputs}"
    if re.fullmatch(r"[0-9a-f]{1,2}", ref):
        raise UserError(problem, fix="type at least three letters of a fingerprint")
    raise UserError(f"{problem}{suggest(ref, [str(run.folder) for run in find(outputs)])}")


@run_files.cache_reads()
def list_runs(outputs: Path, stage: str | None, status: str | None) -> int:
    """Print a table of runs, oldest first within a stage; return the exit status."""
    rows = []
    problems: list[str] = []
    for run in find(outputs):
        state = run.status
        problems += UserErrors(run.problems("status.json", "summary.json")).lines
        if state == "damaged":
            problems += [f"{run.folder / name} {wrong}" for name, wrong in run.damage().items()]
        if stage not in (None, run.stage) or status not in (None, state):
            continue
        summary = run.summary
        value = summary.get("value")
        result = f"{summary.get('headline')} {console.number(value)}" if value is not None else ""
        took = console.duration(summary["wall_s"]) if "wall_s" in summary else ""
        started = run.status_file.get("started", "")[:16].replace("T", " ")
        rows.append((run.stage, state, started, took, result, str(run.folder)))
    for problem in problems:
        console.say(problem, "yellow")
    if not rows:
        print(f"no such runs in {outputs}; `rlhf --help` lists what can be run")
        return 0
    console.print_table("", ("stage", "status", "started", "time", "result", "directory"), rows)
    return 0


def show(run: Run) -> int:
    """Print a run's status, inputs, ancestors, metrics and config; return the exit status."""
    status, summary, lineage = run.status_file, run.summary, run.lineage
    facts = [
        ("folder", str(run.folder)),
        ("status", run.status + (f": {status['error']}" if status.get("error") else "")),
        ("fingerprint", run.fingerprint),
        ("command", str(status.get("command", ""))),
        ("started", str(status.get("started", ""))),
    ]
    if "wall_s" in summary:
        facts.append(("time", console.duration(summary["wall_s"])))
    for name in ("tokens_per_s", "samples_per_s", "median_step_s"):
        if name in summary:
            facts.append((name, console.number(summary[name])))
    for role, identities in lineage.get("inputs", {}).items():
        ancestors = lineage.get("ancestors", {})
        facts.append((f"input {role}", ", ".join(str(ancestors.get(i, {}).get("folder", i)) for i in identities)))
    for name, wrong in run.damage().items() if run.status == "damaged" else ():
        facts.append((name, wrong))
    for problem in UserErrors(run.problems()).lines:
        console.say(problem, "yellow")
    console.print_table("Run", ("", ""), facts)
    console.print_table("Metrics", ("", ""), [(name, console.number(v)) for name, v in sorted(run.metrics.items())])
    lines = [(str(a.get("stage")), str(a.get("folder"))) for a in lineage.get("ancestors", {}).values()]
    console.print_table("Ancestors", ("", ""), lines)
    console.say("Config", "bold")
    print(OmegaConf.to_yaml(OmegaConf.create(run.plain_config)), end="")
    return 0


def check(runs: list[Run]) -> int:
    """Compare finished runs with the hashes in their manifests; return 1 if any differs, else 0."""
    damaged, changed, without = 0, [], 0
    for run in runs:
        problems = [*UserErrors(run.problems()).lines]
        if run.status_file.get("status") == "finished":
            damage = run.damage(thorough=True)
            problems += [f"{run.folder / name} {wrong}" for name, wrong in damage.items()]
            changed += [run.folder] * bool(damage)
            without += not (run.folder / manifest.FILE).exists()
        for problem in problems:
            console.say(problem, "yellow")
        damaged += bool(problems)
    old = f", {without} of them finished by an older version, without hashes" if without else ""
    print(f"checked {len(runs)} runs{old}: {damaged} damaged")
    if changed:  # reuse compares only sizes, so a run with changed content has to be removed
        print("to compute them again, type their commands (`rlhf runs show RUN`) after:")
        print(f"  {shell('rlhf', 'runs', 'rm', '--force', *changed)}")
    return 1 if damaged else 0


def remove_runs(outputs: Path, refs: list[str], unfinished: bool, yes: bool, force: bool) -> int:
    """Remove run directories after confirmation; return the exit status.

    Raises:
        UserError: no run is named, a name is no run below `outputs`, a run is being computed, or others were made from
            it.
    """
    everything = find(outputs)
    chosen = [named(ref, outputs) for ref in refs]
    if unfinished:
        chosen += [run for run in everything if run.status in ("failed", "killed", "stopped")]
    chosen = list({run.folder.absolute(): run for run in chosen}.values())
    for run in chosen:
        if not is_run_directory(run.folder, outputs):
            raise UserError(
                f"{run.folder}: is not a run directory in {outputs}",
                fix=f"type {outputs}/STAGE/FINGERPRINT as rlhf runs list prints it, or --outputs for another directory",
            )
    if not chosen:
        if unfinished:
            swept = sweep_out(outputs)
            print(f"removed the remains of {swept} runs" if swept else "nothing to remove")
            return 0
        raise UserError("rlhf runs rm: names no run", fix="type a run, or --unfinished")
    leaving = {run.fingerprint for run in chosen}
    for run in chosen:
        if run.status == "running":
            raise _computed(run)
        if force:
            continue
        children = [child for child in everything if child.fingerprint not in leaving and _made_from(child, run)]
        if children:
            child = children[0]
            uses = "was made from" if child.finished else f"({child.status}) reads"
            raise UserError(f"{child.folder} {uses} {run.folder}", fix="type --force to remove it anyway")
    if not options.confirm_removal([f"{run.folder}  {run.status}" for run in chosen], yes):
        return 1
    for run in chosen:
        try:
            with run.lock():
                delete(run)
        except Locked:
            raise _computed(run) from None
    sweep_out(outputs)
    print(f"removed {len(chosen)}")
    return 0


def delete(run: Run) -> None:
    """Remove a run whose lock is held; rename it first, so that a kill leaves no partial run in its place."""
    away = run.folder.with_name(f"{REMOVED}{run.folder.name}.{os.getpid()}")
    run.folder.rename(away)
    _remove_all(away)


def sweep_out(outputs: Path) -> int:
    """Remove the remains of runs whose removal was killed in earlier commands; return their number."""
    left = [path for path in outputs.glob(f"*/{REMOVED}*") if not path.parent.is_symlink()]
    for path in left:
        _remove_all(path)
    return len(left)


def _remove_all(folder: Path) -> None:
    """Remove a directory from which another process may be removing files at the same time."""
    while folder.exists():
        with suppress(FileNotFoundError):
            remove(folder)


def _computed(run: Run) -> UserError:
    problem = f"{run.folder} is being computed by process {run.status_file.get('pid')}"
    return UserError(problem, fix="stop that process first")


def _made_from(child: Run, run: Run) -> bool:
    return run.fingerprint in child.lineage.get("ancestors", {})
