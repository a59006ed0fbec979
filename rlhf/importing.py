"""Import of code that a config names: any exception of its modules becomes an ordinary error. No torch here."""

import importlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rlhf.errors import RLHFError, UserError, suggest


class ModuleEnded(Exception):
    """Error for a module that tried to end the process during its import, by SystemExit or the like."""


@contextmanager
def catch_exits() -> Iterator[None]:
    """Context manager around an import: SystemExit, GeneratorExit and the like of a module become `ModuleEnded`.

    sys.exit(0) in a module would look like success, and its KeyboardInterrupt like the user's. A KeyboardInterrupt that
    the user's Ctrl-C caused passes: it is recognized by the signal that precedes it.
    """
    came: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    here = threading.current_thread() is threading.main_thread()  # Ctrl-C interrupts the main thread
    watched = here and callable(before)  # no signal arrives where it is ignored

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if callable(before):
            before(number, frame)

    if watched:
        signal.signal(signal.SIGINT, note)
    try:
        yield
    except BaseException as error:
        by_user = isinstance(error, KeyboardInterrupt) and (came or not here)
        if isinstance(error, Exception) or by_user:
            raise
        raise ModuleEnded(f"the module raises {type(error).__name__}{f'({error})' if str(error) else ''}") from error
    finally:
        if watched:
            signal.signal(signal.SIGINT, before)


def load_function(option: str, name: str) -> Callable[..., Any]:
    """Import a function.

    Args:
        option: Config key that names it, for errors.
        name: The name, as `module:function` or `package.module:function`.

    Raises:
        UserError: There is no such module or function, or importing the module fails.
    """
    module, _, function = name.partition(":")
    if not (module and function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise UserError(
            "is not of the form module:function",
            fix="type for example my_module:my_function for my_module.py in this directory",
            option=option,
            value=name,
        )
    try:
        with catch_exits():
            loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            raise UserError(
                f"no module {error.name}, neither in {os.getcwd()} nor installed",
                fix=f"type the command in the directory of {error.name.replace('.', '/')}.py, or install its package",
                option=option,
                value=name,
            ) from error
        raise UserError(
            f"{module} imports {error.name}, which is not installed",
            fix="install its package",
            option=option,
            value=name,
        ) from error
    except Exception as error:  # a foreign module may raise anything
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise UserError(
            f"importing {module} failed with {type(error).__name__}: {reason}",
            fix="correct the module",
            option=option,
            value=name,
        ) from error
    found = getattr(loaded, function, None)
    if not callable(found):
        functions = [word for word, value in vars(loaded).items() if callable(value) and not word.startswith("_")]
        hint = suggest(function, functions)
        raise UserError(f"{loaded.__file__ or module} has no function {function}{hint}", option=option, value=name)
    called: Callable[..., Any] = found
    return called


def build_option(node: Any) -> Any:
    """Build the object of a config node and raise a constructor's `RLHFError` without Hydra's wrapper around it."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(node)
    except InstantiationException as error:
        cause = error.__cause__
        while cause is not None and not isinstance(cause, RLHFError):
            cause = cause.__cause__
        if cause is None:
            raise
    raise cause  # outside of the block, so that the two errors do not become each other's context
