"""Rules for the source of errors: config keys are marked, and no code edits the text of an error raised elsewhere."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from rlhf import discovery

ROOT = Path(__file__).resolve().parents[1]
ERRORS = ("UserError", "RunFailed", "TooFewHeldOut")
# Code that may run as a step of a pipeline, in which keys have the step's name as prefix. Other code knows its keys as
# they are typed.
BELOW_A_STEP = ["functional", "storage", "runs", "data", "models", "sampler", "reward", "annotator", "logger"]
BELOW_A_STEP += ["callbacks", "stage", "planning/checks"]
SOURCES = sorted([*(ROOT / "rlhf").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")])
STEP_SOURCES = [
    path
    for path in SOURCES
    if path.is_relative_to(ROOT / "plugins")
    or any(path.is_relative_to(ROOT / "rlhf" / package) for package in BELOW_A_STEP)
]
EDITS = {"replace", "split", "splitlines", "partition", "rpartition", "startswith", "endswith", "removeprefix"}
EDITS |= {"removesuffix", "find", "index", "sub", "search", "match", "fullmatch", "findall"}


def name_of(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def texts(node: ast.AST) -> Iterator[ast.Constant]:
    """Yield the text of a message that no call of ``key`` marks."""
    if isinstance(node, ast.Call) and name_of(node.func) == "key":
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from texts(child)


@cache
def groups() -> str:
    return "|".join(sorted({*discovery.group_names(), "inputs", "text", "demonstrations"}))


def config_keys(text: str) -> list[str]:
    """Return the config keys and overrides in a text; "a run of stage=sft" describes a run and is not typed."""
    found = re.finditer(
        rf"(?<![\w./@-])(?<!run of )(?:{groups()})(?:(?!\.(?:jsonl?|txt|csv)\b)(?:\.[a-z_]+)+|=\w*)(?!\w*\()", text
    )
    return [match[0] for match in found]


def unmarked(source: str) -> list[str]:
    """Return "line: key" of the config keys that an error names in problem or fix without ``key``."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and name_of(call.func) in ERRORS:
            parts = [*call.args[:2], *(k.value for k in call.keywords if k.arg in ("problem", "fix"))]
            found += [f"{x.lineno}: {name}" for part in parts for x in texts(part) for name in config_keys(x.value)]
    return found


def edited(source: str) -> list[int]:
    """Return the lines that read or edit the text of a caught error of this package."""
    found = []
    for handler in ast.walk(ast.parse(source)):
        if not isinstance(handler, ast.ExceptHandler) or handler.name is None or handler.type is None:
            continue
        kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        if not {name_of(kind) for kind in kinds} & {*ERRORS, "RLHFError", "UserErrors"}:
            continue
        text = rf"str\({handler.name}\)|\b{handler.name}\.(problem|fix|args)"
        for node in ast.walk(handler):
            is_edit = isinstance(node, ast.Call) and name_of(node.func) in EDITS
            is_test = isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn | ast.Eq)
            if (is_edit or is_test) and re.search(text, ast.unparse(node)):
                found.append(node.lineno)
    return found


def test_errors_mark_the_config_keys_that_they_name() -> None:
    found = {str(path.relative_to(ROOT)): unmarked(path.read_text()) for path in STEP_SOURCES}
    assert {path: keys for path, keys in found.items() if keys} == {}


def test_no_code_edits_the_text_of_an_error() -> None:
    found = {str(path.relative_to(ROOT)): edited(path.read_text()) for path in SOURCES}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_these_rules_find_faults() -> None:
    assert unmarked("UserError(f'raise data.max_bad={x}', fix='type sampler=group', option='data.size')") == [
        "1: data.max_bad",
        "1: sampler=group",
    ]
    assert unmarked("UserError(f'see {key(\"data.size\")} in data.jsonl and ./data.txt of data.Data()')") == []
    code = "try:\n  f()\nexcept (UserError, OSError) as e:\n  raise X(str(e).replace('a', 'b'))"
    assert edited(code) == [4]
    assert edited(code.replace("str(e)", "e")) == []
    assert edited("try:\n  f()\nexcept UserError as e:\n  if 'a' in str(e): pass") == [4]
