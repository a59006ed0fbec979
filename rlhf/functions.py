"""Functions that a config names as `module:function`: installed ones, or those beside the command. No torch here."""

import importlib
import os
from collections.abc import Callable
from typing import Any

from rlhf.errors import UserError, suggest
from rlhf.importing import contained


def load(key: str, name: str) -> Callable[..., Any]:
    """Import a function.

    Args:
        key: Config key that names it, for messages.
        name: The name, as `module:function` or `package.module:function`.

    Raises:
        UserError: There is no such module or function, or importing the module fails.
    """
    module, _, function = name.partition(":")
    if not (module and function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise UserError(
            f"{key}={name}: write it as module:function, such as my_module:my_function for my_module.py here"
        )
    try:
        with contained():
            loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            raise UserError(
                f"{key}={name}: no module {error.name}, neither in {os.getcwd()} nor installed; type the command where "
                f"{error.name.replace('.', '/')}.py lies, or install its package"
            ) from error
        raise UserError(f"{key}={name}: {module} imports {error.name}, which is not installed") from error
    except Exception as error:  # whatever a stranger's module raises
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise UserError(f"{key}={name}: importing {module} failed: {type(error).__name__}: {reason}") from error
    found = getattr(loaded, function, None)
    if not callable(found):
        functions = [word for word, value in vars(loaded).items() if callable(value) and not word.startswith("_")]
        hint = suggest(function, functions)
        raise UserError(f"{key}={name}: {loaded.__file__ or module} has no function {function}{hint}")
    called: Callable[..., Any] = found
    return called
