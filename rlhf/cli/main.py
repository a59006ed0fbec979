"""Entry point of the command `rlhf`: help, sub-commands, and otherwise Hydra. This module imports no torch."""

import json
import locale
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from rlhf import __version__, console, discovery
from rlhf.errors import RLHFError, RunFailed, UserError, shorten, suggest
from rlhf.models.machine_memory import use_large_pages
from rlhf.planning import rounds
from rlhf.running import launcher, processes

FULL_ERROR = "HYDRA_FULL_ERROR"


def main() -> None:
    """Run one command line and exit with its status: 0 success, 1 a run failed, 2 the user can fix it."""
    _ensure_utf8()
    use_large_pages()
    sys.exit(run(sys.argv[1:]))


def _ensure_utf8() -> None:
    """Restart in Python's UTF-8 mode if the locale has another encoding.

    Otherwise arguments and file names would be read in that encoding, and libraries would open their files in it; UTF-8
    content would raise UnicodeDecodeError. Child processes inherit the mode.
    """
    encodings = {locale.getpreferredencoding(False).lower(), sys.getfilesystemencoding().lower()}
    if not sys.flags.utf8_mode and encodings - {"utf-8", "utf8"}:
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@console.screen()
def run(argv: list[str]) -> int:
    """Run the given arguments as `main` does; return the exit status."""
    # Hydra prints its own errors and exits unless HYDRA_FULL_ERROR is set; it is restored before any job starts.
    debug = os.environ.get(FULL_ERROR)
    try:
        processes.end_with_parent()
        return dispatch(argv)
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
            return 1
        return int(e.code or 0)
    except KeyboardInterrupt:
        print("interrupted; type the same command again to continue", file=sys.stderr)
        return 130
    except Exception as e:
        _restore(debug)
        return report(e, debug == "1", argv)
    finally:
        _restore(debug)


def dispatch(argv: list[str]) -> int:
    """Print help, run a sub-command, or compose and run an experiment with Hydra; return the exit status."""
    from rlhf.cli import help as pages

    discovery.add_working_directory()
    if "--help" in argv or "-h" in argv:
        if not argv[0].startswith("-") and "=" not in argv[0]:
            return subcommand(argv)
        launcher.register()
        overrides = [word for word in argv if "=" in word]
        print(pages.chosen(overrides) if overrides else pages.front())
        return 0
    if "--version" in argv:
        print(f"rlhf {__version__}")
        return 0
    if not argv:
        print(pages.usage(), file=sys.stderr)
        return 2
    if not argv[0].startswith(("-", "+", "~")) and "=" not in argv[0]:
        return subcommand(argv)
    shell_query = next((word for word in argv if word.startswith("query=")), None)
    if shell_query is not None and {"-sc", "--shell-completion"} & set(argv):
        from rlhf.cli import complete

        register()
        print(complete.query(shell_query.partition("=")[2], os.environ.get("COMP_LINE", "")))
        return 0

    with discovery.lookup_cache.open():
        return run_experiment(argv)


def run_experiment(argv: list[str]) -> int:
    """Compose the config of a stage, a pipeline or a sweep with Hydra and run it; return the exit status."""
    from rlhf.cli import composing, dry_run, words

    words.check(argv)
    register()
    dry = dry_run.FLAG in argv
    argv = [word for word in argv if word != dry_run.FLAG]
    # Hydra parses words after -m as a second list of overrides, and rejects them.
    flags = {"-m", "--multirun"} & set(argv)
    argv = rounds.mark_round_overrides([word for word in argv if word not in flags])
    if flags:
        from rlhf.cli.deferred import deferred

        argv = [*deferred(dry_run.prepare_sweep(argv)), "--multirun"]
    else:
        dry_run.prepare_sweep([])  # the options of conf/sweep start a sweep without -m
    user_debug = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR] = "1"

    def task(config: DictConfig) -> float | None:
        _restore(user_debug)
        return run_task(config, user_debug == "1", argv)

    # Not used as a decorator: launchers that pickle the task look it up by its name.
    task.__module__, task.__qualname__ = __name__, "run_task"
    sys.argv = [sys.argv[0], *argv]
    try:
        with dry_run.switched(dry):
            if any(word.startswith("-") for word in argv):
                hydra.main(version_base="1.3", config_path=str(discovery.conf_dir()), config_name="config")(task)()
            else:
                composing.run_composed_once(task, argv)
    except SystemExit as e:
        if e.code == 1 and {"-c", "--cfg"} & {word.partition("=")[0] for word in argv}:
            return 2  # nothing ran: Hydra has reported that the config has no such --package
        raise
    finally:
        launcher.prepare = None
        launcher.finish()
        HydraConfig.instance().cfg = None  # a later run in this process must not see this config
    return 0


def register() -> None:
    """Register everything that composing a config needs: plugins, launcher, resolvers."""
    launcher.register()
    from rlhf.planning import step_config as config

    config.register_resolvers()


def run_task(config: DictConfig, debug: bool = False, argv: list[str] | None = None) -> float | None:
    """Run one job, a stage or a pipeline; return its headline metric, for sweepers.

    Errors end the process here, so that Hydra adds nothing to the output. In a sweep that runs its jobs in this process
    (a third-party launcher) they are raised instead, so that only that job fails.
    """
    # Repeated, because a launcher may run the job in a process that did not call main.
    from rlhf.cli import dry_run

    register()
    words = argv if argv is not None else list(HydraConfig.get().overrides.task)
    try:
        if "stage" not in config and "steps" not in config:
            from rlhf.cli.help import UsageError, usage

            chosen = " ".join(word for word in words if word.startswith(("~", "stage=", "pipeline=", "experiment=")))
            if not chosen:
                raise UsageError(usage(words))
            fix = "type stage=NAME or pipeline=NAME, or leave it out"
            raise UserError(f"{chosen}: leaves neither a stage nor a pipeline", fix=fix)
        if dry_run.requested():
            dry_run.show(config, list(HydraConfig.get().overrides.task))
            return None
        from rlhf.running import pipeline

        value = pipeline.run(config)
    except (Exception, SystemExit) as e:
        if isinstance(e, SystemExit) and e.code:  # an interruption, already reported
            raise
        error = (
            e if isinstance(e, Exception) else RunFailed("code that the config names called sys.exit(0); not finished")
        )
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise error from None
        status = report(error, debug, words)
        write_result({"status": "failed", "error": str(explain(error, words))})
        raise SystemExit(status) from None
    write_result({"status": "finished", "value": value})
    return value


def write_result(result: dict[str, Any]) -> None:
    """Write the result of this job for the launcher, unless the pipeline has already written a more detailed one."""
    path = os.environ.get(processes.RESULT)
    if path and not Path(path).exists():
        Path(path).write_text(json.dumps(result) + "\n", encoding="utf-8")


def subcommand(argv: list[str]) -> int:
    """Import and run a sub-command; return its exit status.

    Raises:
        UserError: there is no such command.
    """
    from rlhf.cli.help import subcommands

    name = argv[0]
    known = subcommands()
    if name not in known:
        stages = [o.split("/")[1] for p in discovery.discover()[0] for o in p.options() if o.startswith("stage/")]
        hint = f" (did you mean stage={name}?)" if name in stages else suggest(name, known)
        raise UserError(f"{name}: no such command{hint}", fix="type rlhf --help for a list")
    return import_module(f"rlhf.cli.{name}").main(argv[1:]) or 0


def report(error: BaseException, debug: bool, argv: list[str] | None = None) -> int:
    """Print an error as one line (several problems: several lines) and return the exit status.

    A traceback precedes it if HYDRA_FULL_ERROR=1, and, for errors that the user cannot fix, in a sweep, whose terminal
    output goes to a log file.
    """
    from rlhf.cli.help import UsageError

    user_can_fix = status_of(error) == 2
    if debug or (os.environ.get(processes.RESULT) and not user_can_fix):
        traceback.print_exception(error)
    head = "config error" if isinstance(error, HydraException | OmegaConfBaseException) else "error"
    if isinstance(error, UsageError):
        print(shorten(str(error)), file=sys.stderr)
        return 2
    for line in explain(error, argv).lines:
        print(f"{head}: {shorten(line)}", file=sys.stderr)
    if not isinstance(error, RLHFError) and not user_can_fix and not debug:
        print(f"type {FULL_ERROR}=1 before the command to see where it happened", file=sys.stderr)
    return status_of(error)


def status_of(error: BaseException) -> int:
    """Return the exit status of an error: its own for an `RLHFError`, otherwise 2 if the user can fix it, 1 if not."""
    from rlhf.cli.messages import user_fixable

    if isinstance(error, RLHFError):
        return error.exit_code
    return 2 if user_fixable(error) else 1


def explain(error: BaseException, argv: list[str] | None = None) -> RLHFError:
    """Call `rlhf.cli.messages.explain`, which is imported late."""
    from rlhf.cli import messages

    return messages.explain(error, argv or [])


def _restore(value: str | None) -> None:
    if value is None:
        os.environ.pop(FULL_ERROR, None)
    else:
        os.environ[FULL_ERROR] = value
