"""Exception hierarchy: `UserError` (the user can fix it, exit 2) and `RunFailed` (exit 1). Standard library only."""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, Self

Rename = Callable[[str], str]

_MARKED = re.compile("\x02([^\x03]*)\x03")


class RLHFError(Exception):
    """Base class of this package's errors, printed as ``WHERE: OPTION=VALUE: PROBLEM; FIX`` without a traceback.

    The code that raises an error knows its config keys by their place in its own group (``data.size``). A caller that
    knows where the user typed them renames them with `rename` before the error is printed. Keys inside ``problem`` and
    ``fix`` are renamed too if they are marked by `key`; other text never changes.

    Attributes:
        problem: What is wrong.
        fix: What to type instead; "" if the problem leaves no choice.
        option: Config key or command-line option at fault; "" if there is none.
        value: Its value, as typed; None if the message names the option alone.
        where: Step at fault; "" outside of a pipeline.
    """

    exit_code = 1

    def __init__(self, problem: str = "", fix: str = "", option: str = "", value: Any = ..., where: str = "") -> None:
        super().__init__(problem, fix, option, value, where)
        self.problem, self.fix, self.option, self.where = problem, fix, option, where
        self.value = None if value is ... else format_value(value)

    def __str__(self) -> str:
        head = _as_typed(_join(self.option, self.value))
        text = f"{self.problem}; {self.fix}" if self.problem and self.fix else self.problem or self.fix
        text = _MARKED.sub(lambda mark: _as_typed(mark[1]), text)
        return ": ".join(part for part in (self.where, head, text) if part)

    @property
    def findings(self) -> "tuple[RLHFError, ...]":
        """The errors that this one reports: itself, or those of `UserErrors`."""
        return (self,)

    @property
    def lines(self) -> tuple[str, ...]:
        """The distinct findings, one line each."""
        return tuple(dict.fromkeys(str(one) for one in self.findings))

    @property
    def fix_keys(self) -> tuple[str, ...]:
        """The config keys that the fix names, without values, signs and groups."""
        return tuple(parse_override(mark)[2] for mark in _MARKED.findall(self.fix))

    def rename(self, rename: Rename) -> Self:
        """Rename the config keys of this error in place, and return it.

        Args:
            rename: Function of a config key, or of an override that sets one, such as `moved` returns.
        """
        if self.option:
            self.option, self.value = _split(rename(_join(self.option, self.value)))
        self.problem = _MARKED.sub(lambda mark: f"\x02{rename(mark[1])}\x03", self.problem)
        self.fix = _MARKED.sub(lambda mark: f"\x02{rename(mark[1])}\x03", self.fix)
        return self


def error_fields(error: RLHFError) -> list[dict[str, str | None]]:
    """Return the findings of an error as plain values, which another process reads with `error_from_fields`."""
    names = ("problem", "fix", "option", "value", "where")
    return [{name: getattr(finding, name) for name in names} for finding in error.findings]


def error_from_fields(fields: list[dict[str, Any]], kind: "type[RLHFError]") -> "RLHFError":
    """Return the error of class ``kind`` with these fields; `UserErrors` if there are several."""
    found = [kind(**{**each, "value": ... if each["value"] is None else each["value"]}) for each in fields]
    return found[0] if len(found) == 1 else UserErrors(found)


class UserError(RLHFError):
    """Error that the user can fix by typing something else. Exit status 2."""

    exit_code = 2


class UserErrors(UserError):
    """Several errors that the user can fix, printed one per line.

    Args:
        errors: The errors, in order; equal lines are printed once.
    """

    def __init__(self, errors: Iterable[RLHFError]) -> None:
        super().__init__()
        self._findings = tuple(finding for error in errors for finding in error.findings)
        self.args = (self._findings,)

    def __str__(self) -> str:
        return "\n".join(self.lines)

    @property
    def findings(self) -> tuple[RLHFError, ...]:
        """The errors."""
        return self._findings

    def rename(self, rename: Rename) -> Self:
        """Rename the config keys of every finding in place, and return this error."""
        for finding in self._findings:
            finding.rename(rename)
        return self


class RunFailed(RLHFError):
    """Failure of a run that had started. Exit status 1."""


def key(name: str, value: Any = ...) -> str:
    """Mark a config key, or the override that sets it to a value, inside the text of an error.

    Args:
        name: The key as its own group knows it: ``stage.batch_size``, ``sampler`` (for an option of that group),
            ``+data@demonstrations``.
        value: The value to type; without one the key alone is marked.
    """
    return f"\x02{_join(name, None if value is ... else format_value(value))}\x03"


def moved(old: str, new: str) -> Rename:
    """Return a function that renames a config key ``old``, and all keys below it.

    Examples:
        >>> moved("data", "align.data")("data.size=3")
        'align.data.size=3'
        >>> moved("sampler", "align.sampler")("sampler=best_of_k")
        'sampler@align.sampler=best_of_k'
        >>> moved("model.path", "--judge")("model.path=RUN")
        '--judge=RUN'
    """

    def rename(typed: str) -> str:
        sign, group, path, value = parse_override(typed)
        if path != old and not path.startswith((f"{old}.", f"{old}[")):
            return typed
        is_choice = path == old and "." not in old and "." in new and value not in (None, "null")
        group = group or (old if is_choice else "")  # an option of the group, which the defaults list places elsewhere
        return _join(f"{sign}{group}{'@' if group else ''}{new}{path.removeprefix(old)}", value)

    return rename


@contextmanager
def renaming(old: str, new: str) -> Iterator[None]:
    """Context manager: rename a config key ``old``, and all keys below it, in errors raised inside."""
    try:
        yield
    except RLHFError as error:
        error.rename(moved(old, new))
        raise


def override_error(typed: str, problem: str, fix: str = "") -> UserError:
    """Return the error for a word KEY=VALUE or KEY of the command line."""
    option, value = _split(typed)
    return UserError(problem, fix, option, ... if value is None else value)


def parse_override(typed: str) -> tuple[str, str, str, str | None]:
    """Return the sign (+, ++, ~ or ""), the group ("" without @), the path and the value (None without =)."""
    name, value = _split(typed)
    path = name.lstrip("+~")
    group, at, place = path.partition("@")
    return name.removesuffix(path), group if at else "", place if at else path, value


def format_value(value: Any) -> str:
    """Return a value as it is typed on the command line."""
    return "null" if value is None else str(value)


def _join(name: str, value: str | None) -> str:
    return name if value is None else f"{name}={value}"


def _split(typed: str) -> tuple[str, str | None]:
    name, equals, value = typed.partition("=")
    return name, value if equals else None


def _as_typed(typed: str) -> str:
    """Return an override unchanged, a command-line option and its value as two words."""
    return typed.replace("=", " ", 1) if typed.startswith("-") else typed


def suggest(word: str, options: Iterable[str], prefix: str = "") -> str:
    """Return the end of an error line: the likely intended option, else all options.

    The result is " (did you mean PREFIXx?)", " (one of: a, b)", or "" without options. A list longer than 20 is
    truncated.
    """
    known = sorted(set(options))
    close = closest(word, known)
    if close is not None:
        return f" (did you mean {prefix}{close}?)"
    if not known:
        return ""
    return f" (one of: {', '.join(known[:20])}{', ...' if len(known) > 20 else ''})"


def closest(word: str, options: Iterable[str]) -> str | None:
    """Return the likely intended option; None if no option is similar."""
    return next(iter(get_close_matches(word, sorted(set(options)), n=1, cutoff=0.65)), None)


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


CHECK_PATH = "check the path, its permissions and the free space"  # what to do after an OSError


def os_error_line(error: OSError) -> str:
    """Return an OSError as a line that names the file, the reason and what to check."""
    return f"{os_error_problem(error)}; {CHECK_PATH}"


def os_error_problem(error: OSError) -> str:
    """Return the file and the reason of an OSError."""
    name = error.filename if error.filename is not None else ""
    other = f" -> {error.filename2}" if error.filename2 is not None else ""
    reason = error.strerror or first_line(error)
    return f"{name}{other}: {reason}" if name else reason
