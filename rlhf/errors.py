"""Exception hierarchy: `UserError` (the user can fix it, exit 2) and `RunFailed` (exit 1). Standard library only."""

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches


class RLHFError(Exception):
    """Base class of this package's errors, printed as their message without a traceback."""

    exit_code = 1


class UserError(RLHFError):
    """Error that the user can fix by typing something else. Exit status 2.

    The message states the problem and what to type; several findings are given one per line.
    """

    exit_code = 2


class RunFailed(RLHFError):
    """Failure of a run that had started. Exit status 1."""


_DATA_KEY = re.compile(
    r"(?<![\w./-])data\.(?=(?:source|size|validation|max_length|max_prompt_length|format|split|max_bad|tags|streaming)\b)"
)


def qualify_data_keys(message: str, path: str) -> str:
    """Return a message of a data group with its keys ``data.*`` replaced by their keys in the whole config.

    Args:
        message: Message of ``rlhf.data.Data``, which names its own keys ``data.*``.
        path: Config key of the group: data, demonstrations, align.data, data.parts.first.
    """
    return _DATA_KEY.sub(lambda _: f"{path}.", message)


def suggest(word: str, options: Iterable[str], prefix: str = "") -> str:
    """Return the end of an error line: the likely intended option, else all options.

    The result is " (did you mean PREFIXx?)", " (one of: a, b)", or "" without options. A list longer than 20 is
    truncated.
    """
    known = sorted(set(options))
    close = get_close_matches(word, known, n=1, cutoff=0.65)
    if close:
        return f" (did you mean {prefix}{close[0]}?)"
    if not known:
        return ""
    return f" (one of: {', '.join(known[:20])}{', ...' if len(known) > 20 else ''})"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type if the text is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shorten(line: str) -> str:
    """Return a line with the middle of each word of more than 400 letters (a value typed by mistake) cut out."""
    return re.sub(r"\S{401,}", lambda word: f"{word[0][:200]}...{word[0][-40:]}", line)


_NUMBER_OF_RUST = re.compile(r"\(os error (\d+)\)$")


def os_error(error: BaseException) -> OSError | None:
    """Return the OSError behind the error of a library that writes a file; None if there is none.

    On a full disk torch raises a RuntimeError about its archive while it handles the OSError, and safetensors an error
    whose text ends with the error's number, as Rust formats it.
    """
    if isinstance(error, OSError):
        return error
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        return error.__context__
    number = _NUMBER_OF_RUST.search(str(error)) if type(error).__name__ == "SafetensorError" else None
    return None if number is None else OSError(int(number[1]), os.strerror(int(number[1])))


def os_error_line(error: OSError) -> str:
    """Return an OSError as a line that names the file, the reason and what to check."""
    name = error.filename if error.filename is not None else ""
    other = f" -> {error.filename2}" if error.filename2 is not None else ""
    reason = error.strerror or first_line(error)
    said = f"{name}{other}: {reason}" if name else reason
    return f"{said}; check the path, its permissions and the free space"
