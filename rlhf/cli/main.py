"""The entry of the command `rlhf`: help, sub-commands, and otherwise Hydra. No torch is imported here."""

import json
import locale
import os
import sys
import traceback
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from rlhf import __version__, console, discovery, launcher, processes, rounds
from rlhf.errors import RLHFError, RunFailed, UserError, shortened, suggest

RESULT = "RLHF_RESULT"  # names the file in which a job of a sweep leaves its result
FULL_ERROR = "HYDRA_FULL_ERROR"


def main() -> None:
    """Run one command line and exit with its status: 0 done, 1 a run failed, 2 the user can fix it."""
    _speak_utf8()
    sys.exit(run(sys.argv[1:]))


def _speak_utf8() -> None:
    """Start anew in Python's UTF-8 mode where the locale has another encoding.

    Arguments and names of files would be read in that encoding, and libraries would open their files in it; what is
    UTF-8 elsewhere ends in a UnicodeDecodeError. Processes started from here inherit the mode.
    """
    encodings = {locale.getpreferredencoding(False).lower(), sys.getfilesystemencoding().lower()}
    if not sys.flags.utf8_mode and encodings - {"utf-8", "utf8"}:
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@console.screen()
def run(argv: list[str]) -> int:
    """As `main`, with the arguments given and the exit status returned."""
    # Hydra prints its own errors and exits unless this is set; it is taken back before any job starts.
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
        print("interrupted; type the same command again to go on", file=sys.stderr)
        return 130
    except Exception as e:
        _restore(debug)
        return report(e, debug == "1", argv)
    finally:
        _restore(debug)


def dispatch(argv: list[str]) -> int:
    from rlhf.cli import help as pages

    discovery.add_working_directory()
    if "--help" in argv or "-h" in argv:
        if not argv[0].startswith("-") and "=" not in argv[0]:
            return subcommand(argv)
        discovery.register()
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
    asked = next((word for word in argv if word.startswith("query=")), None)
    if asked is not None and {"-sc", "--shell-completion"} & set(argv):
        from rlhf.cli import complete

        register()
        print(complete.query(asked.partition("=")[2], os.environ.get("COMP_LINE", "")))
        return 0

    from rlhf.cli import composing, dry_run, words

    words.check(argv)
    register()
    dry = dry_run.FLAG in argv
    argv = [word for word in argv if word != dry_run.FLAG]
    # Hydra takes words after -m for a second list of overrides, and refuses them.
    flags = {"-m", "--multirun"} & set(argv)
    argv = rounds.typed([word for word in argv if word not in flags])
    if flags:
        from rlhf.cli.deferred import deferred

        argv = [*deferred(dry_run.prepare_sweep(argv)), "--multirun"]
    else:
        dry_run.prepare_sweep([])  # the options of conf/sweep make a sweep without -m
    user_debug = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR] = "1"

    def task(config: DictConfig) -> float | None:
        _restore(user_debug)
        return run_task(config, user_debug == "1", argv)

    # Not used as a decorator: pickling launchers find the task by its name.
    task.__module__, task.__qualname__ = __name__, "run_task"
    sys.argv = [sys.argv[0], *argv]
    try:
        once = nullcontext() if flags else composing.composed_once()
        with discovery.looked_up_once.open(), dry_run.switched(dry), once:
            hydra.main(version_base="1.3", config_path=str(discovery.conf_dir()), config_name="config")(task)()
    except SystemExit as e:
        if e.code == 1 and {"-c", "--cfg"} & {word.partition("=")[0] for word in argv}:
            return 2  # nothing ran, and Hydra has said that the config has no such --package
        raise
    finally:
        launcher.prepare = None
        launcher.finish()
        HydraConfig.instance().cfg = None  # what runs later in this process was not typed here
    return 0


def register() -> None:
    """Everything a config needs before it is composed: plugins, launcher, resolvers."""
    discovery.register()
    from rlhf import config

    config.register_resolvers()


def run_task(config: DictConfig, debug: bool = False, argv: list[str] | None = None) -> float | None:
    """One job: a stage or a pipeline. Returns its headline metric, for sweepers.

    Errors end the process here, so that Hydra adds nothing to what is printed; in a sweep that runs its jobs
    in this very process (a launcher other than ours) they are raised instead and cost that job only.
    """
    # Again, because a launcher may have moved the job to a process that never saw main.
    from rlhf.cli import dry_run

    register()
    words = argv if argv is not None else list(HydraConfig.get().overrides.task)
    try:
        if "stage" not in config and "steps" not in config:
            from rlhf.cli.help import usage

            chosen = " ".join(word for word in words if word.startswith(("~", "stage=", "pipeline=", "experiment=")))
            raise UserError(
                f"{chosen}: leaves neither a stage nor a pipeline; type stage=NAME or pipeline=NAME, or leave it out"
                if chosen
                else usage(words)
            )
        if dry_run.requested():
            dry_run.show(config, list(HydraConfig.get().overrides.task))
            return None
        from rlhf import pipeline

        value = pipeline.run(config)
    except (Exception, SystemExit) as e:
        if isinstance(e, SystemExit) and e.code:  # an interruption, which has said so
            raise
        error = (
            e if isinstance(e, Exception) else RunFailed("code that the config names called sys.exit(0); not finished")
        )
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise error from None
        status = report(error, debug, words)
        leave_result({"status": "failed", "error": explain(error, words)})
        raise SystemExit(status) from None
    leave_result({"status": "finished", "value": value})
    return value


def leave_result(result: dict[str, Any]) -> None:
    """Tell the launcher how this job ended, unless the pipeline has already told it more."""
    path = os.environ.get(RESULT)
    if path and not Path(path).exists():
        Path(path).write_text(json.dumps(result) + "\n", encoding="utf-8")


def subcommand(argv: list[str]) -> int:
    from rlhf.cli.help import subcommands

    name = argv[0]
    known = subcommands()
    if name not in known:
        stages = [o.split("/")[1] for p in discovery.discover()[0] for o in p.options() if o.startswith("stage/")]
        hint = f" (did you mean stage={name}?)" if name in stages else suggest(name, known)
        raise UserError(f"{name}: no such command{hint}; rlhf --help lists everything")
    return import_module(f"rlhf.cli.{name}").main(argv[1:]) or 0


def report(error: BaseException, debug: bool, argv: list[str] | None = None) -> int:
    """Print an error as one line (several findings: several lines) and return the exit status.

    A traceback precedes it where it helps: when HYDRA_FULL_ERROR=1, and, for what the user cannot fix,
    in a sweep, where the screen is a log file.
    """
    user_can_fix = status_of(error) == 2
    if debug or (os.environ.get(RESULT) and not user_can_fix):
        traceback.print_exception(error)
    head = "config error" if isinstance(error, HydraException | OmegaConfBaseException) else "error"
    lines = [shortened(line) for line in explain(error, argv).splitlines()] or [type(error).__name__]
    if isinstance(error, UserError) and lines[0].startswith("usage:"):
        print("\n".join(lines), file=sys.stderr)
        return 2
    for line in lines:
        print(f"{head}: {line}", file=sys.stderr)
    if not isinstance(error, RLHFError) and not user_can_fix and not debug:
        print(f"type {FULL_ERROR}=1 before the command to see where it happened", file=sys.stderr)
    return status_of(error)


def status_of(error: BaseException) -> int:
    from rlhf.cli.messages import user_fixable

    if isinstance(error, RLHFError):
        return error.exit_code
    return 2 if user_fixable(error) else 1


def explain(error: BaseException, argv: list[str] | None = None) -> str:
    from rlhf.cli.messages import explain as words

    return words(error, argv or [])


def _restore(value: str | None) -> None:
    if value is None:
        os.environ.pop(FULL_ERROR, None)
    else:
        os.environ[FULL_ERROR] = value
