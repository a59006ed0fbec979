"""List, show and remove runs: rlhf runs list | show RUN | rm RUN..."""

import argparse
import sys
from pathlib import Path

from omegaconf import OmegaConf

from rlhf.errors import UserError, suggest
from rlhf.report import console
from rlhf.runs import Run, find, remove

STATUSES = ("finished", "running", "killed", "stopped", "failed")


def main(argv: list[str]) -> int:
    """Runs the sub-command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="rlhf runs", description="What lies in the outputs folder.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|show|rm")
    lists = commands.add_parser("list", help="every run: status, main metric, time, folder")
    lists.add_argument("--stage", help="only runs of this stage")
    lists.add_argument("--status", choices=STATUSES, help="only runs in this state")
    shows = commands.add_parser("show", help="one run: what it is, where it comes from, what came out")
    shows.add_argument("run", metavar="RUN", help="run folder, or the first letters of its fingerprint")
    removes = commands.add_parser("rm", help="remove runs; those that others were made from only with --force")
    removes.add_argument("runs", nargs="*", metavar="RUN", help="run folder, or the first letters of its fingerprint")
    removes.add_argument("--unfinished", action="store_true", help="also every failed, killed or stopped run")
    removes.add_argument("--yes", action="store_true", help="do not ask")
    removes.add_argument("--force", action="store_true", help="also if finished runs were made from them")
    for command in (lists, shows, removes):
        command.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder of all results [outputs]")
    args = parser.parse_args(argv)
    if args.command == "list":
        return list_runs(args.outputs, args.stage, args.status)
    if args.command == "show":
        return show(named(args.run, args.outputs))
    return remove_runs(args.outputs, args.runs, args.unfinished, args.yes, args.force)


def named(ref: str, outputs: Path) -> Run:
    """The one run that a folder, the beginning of its path, or the first letters of a fingerprint mean.

    Raises:
        UserError: none or several are meant.
    """
    path = Path(ref)
    if (path / "status.json").exists():
        return Run(path)
    runs = find(outputs)
    beginning = str(path.absolute())
    found = [run for run in runs if run.fingerprint.startswith(ref) or str(run.folder.absolute()).startswith(beginning)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{ref} means more than one run: {', '.join(str(run.folder) for run in found[:5])}")
    raise UserError(f"{ref}: no such run in {outputs}{suggest(ref, [str(run.folder) for run in runs])}")


def list_runs(outputs: Path, stage: str | None, status: str | None) -> int:
    """Prints a table of runs, oldest first within a stage."""
    rows = []
    for run in find(outputs):
        state = run.status
        if stage not in (None, run.stage) or status not in (None, state):
            continue
        summary = run.summary
        value = summary.get("value")
        result = f"{summary.get('headline')} {console.number(value)}" if value is not None else ""
        took = console.duration(float(summary["wall_s"])) if "wall_s" in summary else ""
        started = str(run.status_file.get("started", ""))[:16].replace("T", " ")
        rows.append((run.stage, state, started, took, result, str(run.folder)))
    if not rows:
        print(f"no such runs in {outputs}; `rlhf --help` lists what can be run")
        return 0
    console.print_table("", ("stage", "status", "started", "time", "result", "folder"), rows)
    return 0


def show(run: Run) -> int:
    """Prints what a run is, its inputs and ancestors, its metrics and its config."""
    status, summary, lineage = run.status_file, run.summary, run.lineage
    facts = [
        ("folder", str(run.folder)),
        ("status", run.status + (f": {status['error']}" if status.get("error") else "")),
        ("fingerprint", run.fingerprint),
        ("command", str(status.get("command", ""))),
        ("started", str(status.get("started", ""))),
    ]
    if "wall_s" in summary:
        facts.append(("time", console.duration(float(summary["wall_s"]))))
    for name in ("tokens_per_s", "samples_per_s", "median_step_s"):
        if name in summary:
            facts.append((name, console.number(summary[name])))
    for role, identities in lineage.get("inputs", {}).items():
        ancestors = lineage.get("ancestors", {})
        facts.append((f"input {role}", ", ".join(str(ancestors.get(i, {}).get("folder", i)) for i in identities)))
    console.print_table("Run", ("", ""), facts)
    console.print_table("Metrics", ("", ""), [(name, console.number(v)) for name, v in sorted(run.metrics.items())])
    lines = [(str(a.get("stage")), str(a.get("folder"))) for a in lineage.get("ancestors", {}).values()]
    console.print_table("Ancestors", ("", ""), lines)
    console.say("Config", "bold")
    print(OmegaConf.to_yaml(OmegaConf.create(run.plain_config)), end="")
    return 0


def remove_runs(outputs: Path, refs: list[str], unfinished: bool, yes: bool, force: bool) -> int:
    """Removes run folders after asking.

    Raises:
        UserError: nothing is named, a run is being computed, or finished runs were made from it.
    """
    everything = find(outputs)
    chosen = [named(ref, outputs) for ref in refs]
    if unfinished:
        chosen += [run for run in everything if run.status in ("failed", "killed", "stopped")]
    chosen = list({run.folder.absolute(): run for run in chosen}.values())
    if not chosen:
        if unfinished:
            print("nothing to remove")
            return 0
        raise UserError("rlhf runs rm: name a run, or type --unfinished")
    leaving = {run.fingerprint for run in chosen}
    for run in chosen:
        if run.status == "running":
            raise UserError(f"{run.folder} is being computed by process {run.status_file.get('pid')}; stop that first")
        if force:
            continue
        children = [c for c in everything if c.fingerprint not in leaving and c.finished and _made_from(c, run)]
        if children:
            raise UserError(
                f"{run.folder} is what {children[0].folder} was made from; type --force to remove it anyway"
            )
    for run in chosen:
        print(f"{run.folder}  {run.status}")
    if not yes and (not sys.stdin.isatty() or input("remove? [y/N] ").strip().lower() not in ("y", "yes")):
        print("nothing removed" + ("" if sys.stdin.isatty() else "; type --yes where nobody can be asked"))
        return 1
    for run in chosen:
        remove(run.folder)
    print(f"removed {len(chosen)}")
    return 0


def _made_from(child: Run, run: Run) -> bool:
    return run.fingerprint in child.lineage.get("ancestors", {})
