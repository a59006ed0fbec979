"""Plans without runs: validate every job of a sweep before the first one starts, and print what a command would do."""

import argparse
import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import filter_overrides
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from rlhf.cli.messages import explain
from rlhf.errors import RLHFError, UserError, UserErrors
from rlhf.planning.plan import plan
from rlhf.planning.step import Plan
from rlhf.running import launcher
from rlhf.runs.run_directory import Run

FLAG = "--dry-run"
SWITCH = "RLHF_DRY_RUN"  # an environment variable, because launchers pass these on to the processes that they start

Load = Callable[[], DictConfig]


def requested() -> bool:
    """Return whether the command is a dry run."""
    return os.environ.get(SWITCH) == "1"


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """Context manager: make commands dry runs if ``on``."""
    before = os.environ.get(SWITCH)
    if on:
        os.environ[SWITCH] = "1"
    try:
        yield
    finally:
        if on and before is None:
            del os.environ[SWITCH]


def prepare_sweep(argv: list[str]) -> list[str]:
    """Make the launcher validate all jobs before it starts one; return the command line without ``--cfg``.

    Hydra's own ``--cfg`` composes a single config and rejects swept values; with ``-m`` ours prints the config of every
    job.

    Raises:
        UserError: ``--cfg`` with another value than ``job``.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog="rlhf")
    parser.add_argument("-c", "--cfg")
    parser.add_argument("-p", "--package")
    parser.add_argument("--resolve", action="store_true")
    args, rest = parser.parse_known_args(argv)
    if args.cfg not in (None, "job"):
        problem = "a sweep shows the configs of its jobs"
        raise UserError(problem, fix="type --cfg job, or leave out -m", option="--cfg", value=args.cfg)
    show = None if args.cfg is None else partial(_config_text, package=args.package, resolve=args.resolve)
    launcher.prepare = partial(_prepare, show=show)
    return argv if args.cfg is None else rest


def _prepare(jobs: Sequence[tuple[list[str], Load]], show: Callable[[DictConfig], str] | None) -> None:
    """Plan every job; raise `UserErrors` with all problems, or end the process if this is a dry run."""
    problems: dict[str, list[int]] = {}
    for number, (overrides, load) in enumerate(jobs):
        words = list(filter_overrides(overrides))
        try:
            config = load()
            HydraConfig.instance().set_config(config)
            root = copy.deepcopy(config)
            with read_write(root), open_dict(root):
                del root["hydra"]
            if show is None:
                made = plan(root, words, validate_again=False)
            if show is not None or requested():
                text = "\n".join(describe(made)) if show is None else show(root)
                print(f"# job {number}: {' '.join(words)}\n{text}", flush=True)
        except (RLHFError, HydraException, OmegaConfBaseException) as error:
            for line in explain(error, words).lines:
                problems.setdefault(line, []).append(number)
    if problems:
        raise UserErrors(UserError(line + _of_jobs(numbers, len(jobs))) for line, numbers in problems.items())
    if show is not None or requested():
        raise SystemExit(0)


def _of_jobs(numbers: list[int], count: int) -> str:
    if len(numbers) == count:
        return ""
    named = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    return f" (job{'s' if len(numbers) > 1 else ''} {named}; no job was started)"


def _config_text(root: DictConfig, package: str | None, resolve: bool) -> str:
    node = OmegaConf.select(root, package, throw_on_missing=False) if package else root
    if node is None:
        fix = "type rlhf ... --cfg job to see it"
        raise UserError("is not in the config", fix=fix, option="--package", value=package)
    return OmegaConf.to_yaml(node, resolve=resolve) if OmegaConf.is_config(node) else str(node)


def show(root: DictConfig, overrides: Sequence[str]) -> None:
    """Print what a single run or a pipeline would do.

    Raises:
        UserError: for the same reasons as the run itself.
    """
    print("\n".join(describe(plan(root, overrides))), flush=True)


def describe(made: Plan) -> Iterator[str]:
    """Yield the notes of a plan and one line for each step: its run directory, and if it is reused, resumed or run."""
    yield from made.notes
    for name, reason in made.skipped.items():
        yield f"{name}: {reason}"
    width = max(len(step.name) for step in made.steps)
    for step in made.steps:
        run = Run(step.folder)
        does = "reused" if run.finished else "resumes" if run.checkpoints else "to run"
        yield f"{step.name:<{width}}  {step.folder}  {does}"
