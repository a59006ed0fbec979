"""Files of a run directory as they are read back: every field is checked for the type that its readers need.

A file that cannot be read counts as empty, a field of another type is left out, and one error names each of them. So
one broken run affects only its own numbers. No torch here.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlhf.errors import RLHFError, UserError
from rlhf.storage.cache import Once
from rlhf.storage.files import no_file, read_json

Plain = dict[str, Any]
Check = Callable[[Any], Any]  # returns the validated value; raises ValueError("not a ...")


def text(value: Any) -> str:
    """Return a string, with unpaired surrogates replaced, which no file or terminal accepts."""
    if not isinstance(value, str):
        raise ValueError("not a string")
    return value.encode("utf-8", errors="replace").decode("utf-8")


def number(value: Any) -> float:
    """Return a number, which may be nan or infinite."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError("not a number")
    return value


def finite(value: Any) -> float:
    """Return a finite number."""
    if not math.isfinite(number(value)):
        raise ValueError("not a finite number")
    return value


def amount(value: Any) -> float:
    """Return a finite number of at least 0."""
    if not (math.isfinite(number(value)) and value >= 0):
        raise ValueError("not a finite number of at least 0")
    return float(value) if isinstance(value, float) else int(value)


def count(value: Any) -> int:
    """Return a whole number of at least 0."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError("not a whole number of at least 0")
    return value


def process(value: Any) -> int:
    """Return a process id."""
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**31:
        raise ValueError("not a process id")
    return value


def table(value: Any) -> Plain:
    """Return a mapping with its keys converted to strings."""
    if not isinstance(value, dict):
        raise ValueError("not a mapping")
    return {str(key): inner for key, inner in value.items()}


def optional(check: Check) -> Check:
    """Return a check that accepts null in addition to what `check` accepts."""
    return lambda value: None if value is None else check(value)


def list_of(check: Check) -> Check:
    """Return a check of a list that applies `check` to each element."""

    def checked(value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise ValueError("not a list")
        return [check(inner) for inner in value]

    return checked


def table_of(check: Check) -> Check:
    """Return a check of a mapping that applies `check` to each value."""
    return lambda value: {key: check(inner) for key, inner in table(value).items()}


def fields_of(fields: Mapping[str, Check]) -> Check:
    """Return a check of a mapping that checks those of `fields` that are present; other keys pass."""
    return lambda value: {key: fields[key](inner) if key in fields else inner for key, inner in table(value).items()}


_estimates = table_of(fields_of({"mean": number}))
_sample = fields_of({"prompt": text, "after": text, "after_scores": table})
_identities = table_of(list_of(text))
_ancestor = fields_of(
    {
        **dict.fromkeys(("stage", "folder"), optional(text)),
        "inputs": optional(_identities),
        "parents": optional(list_of(text)),
    }
)

STATUS: dict[str, Check] = {
    **dict.fromkeys(("status", "stage", "fingerprint", "host", "started", "ended", "command", "error"), text),
    "pid": process,
    "attempt": count,
}
SUMMARY: dict[str, Check] = {
    **dict.fromkeys(("stage", "headline", "command"), text),
    **dict.fromkeys(("wall_s", "tokens_per_s", "samples_per_s", "median_step_s", "train_s"), amount),
    **dict.fromkeys(("peak_memory_bytes", "weights_bytes"), table_of(amount)),
    **dict.fromkeys(("versions", "hardware"), table),
    "value": optional(number),
    "metrics": table_of(number),
    "attempts": count,
}
LINEAGE: dict[str, Check] = {
    **dict.fromkeys(("fingerprint", "stage", "folder"), text),
    "inputs": _identities,
    "parents": list_of(text),
    "ancestors": table_of(_ancestor),
}
CONFIG: dict[str, Check] = {
    **dict.fromkeys(("adapter", "data", "objective", "stage", "trainer"), optional(table)),
    "model": optional(fields_of({"path": optional(text)})),
    "inputs": optional(table_of(lambda value: value if value is None or isinstance(value, list) else text(value))),
}
EVALUATION: dict[str, Check] = {
    **dict.fromkeys(("before", "after", "differences"), _estimates),
    "kl": optional(fields_of({"mean": number})),
    "samples": list_of(_sample),
}
EVALUATIONS: dict[str, Check] = {
    "evaluations": list_of(fields_of({"metrics": table_of(fields_of(dict.fromkeys(("mean", "se"), optional(number))))}))
}


once = Once("run_files")
cache_reads = once.open  # for lists and reports


def read(path: Path, fields: Mapping[str, Check]) -> tuple[Plain, list[RLHFError]]:
    """Return the valid fields of a JSON file, and one error for each problem.

    A missing file is empty without a problem.
    """
    content, problems = once.get(path, lambda: _read(path, fields))
    return dict(content), list(problems)


def _read(path: Path, fields: Mapping[str, Check]) -> tuple[Plain, list[RLHFError]]:
    if not path.exists():
        return {}, []
    content, reason = read_json(path)
    if reason is not None:
        return {}, [UserError(f"{path}: {reason}")]
    return good(path, content, fields)


def required(path: Path, fields: Mapping[str, Check], fix: str) -> Plain:
    """Return the mapping in a JSON file that must exist, its fields checked.

    Args:
        path: The file.
        fields: Checks of its required fields; a field whose check is `optional` may be missing and is then None.
        fix: The error's fix for a damaged file.

    Raises:
        UserError: If the file cannot be read, is not a mapping, or lacks a field.
    """
    content, reason = read_json(path)
    if reason is None and not isinstance(content, dict):
        reason = "is not a mapping"
    for name, check in fields.items() if reason is None else ():
        try:
            content[name] = check(content.get(name))
        except ValueError as error:
            reason = f"{name} is {_shown(content[name])}, {error}" if name in content else f"has no {name}"
            break
    if reason is not None:
        raise UserError(f"{path}: {reason}", fix)
    found: Plain = content
    return found


def good(path: Path, content: Any, fields: Mapping[str, Check]) -> tuple[Plain, list[RLHFError]]:
    """Return the valid fields of a mapping, and one error for each field that is left out."""
    if not isinstance(content, dict):
        return {}, [UserError(f"{path}: is not a mapping")]
    found: Plain = {}
    problems: list[RLHFError] = []
    for name, value in content.items():
        try:
            found[str(name)] = fields[name](value) if name in fields else value
        except ValueError as error:
            problems.append(UserError(f"{path}: {name} is {_shown(value)}, {error}, and is left out"))
    return found, problems


def rows(path: Path, last: int) -> list[Plain]:
    """Return the mappings among the last `last` lines of a JSON-lines file; empty if it is missing or unreadable."""
    if no_file(path):
        return []
    try:
        lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()[-last:]
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        found += [row] if isinstance(row, dict) else []
    return found


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
