"""What can go wrong, sorted by who can mend it. Standard library only."""

from collections.abc import Iterable
from difflib import get_close_matches


class RLHFError(Exception):
    """Base of this package's errors: shown as its message, without a traceback."""

    exit_code = 1


class UserError(RLHFError):
    """Something the user can fix by typing something else. Exit status 2.

    The message says what is wrong and what to type; several findings are given one a line.
    """

    exit_code = 2


class RunFailed(RLHFError):
    """A run that started and did not finish. Exit status 1."""


def suggest(word: str, options: Iterable[str], prefix: str = "") -> str:
    """The end of an error line: the likely intended option, else all of them.

    Returns " (did you mean PREFIXx?)", " (one of: a, b)", or "" without options. A list longer than 20 is cut.
    """
    known = sorted(set(options))
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f" (did you mean {prefix}{close[0]}?)"
    if not known:
        return ""
    return f" (one of: {', '.join(known[:20])}{', ...' if len(known) > 20 else ''})"
