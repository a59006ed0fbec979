"""Which tests there are, for tables that name them."""

import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@cache
def known() -> frozenset[str]:
    """`tests/folder/file.py::test_name` of every test."""
    return frozenset(
        f"{path.relative_to(ROOT).as_posix()}::{name}"
        for path in ROOT.glob("tests/**/test_*.py")
        for name in re.findall(r"^\s*(?:async )?def (test_\w+)", path.read_text(encoding="utf-8"), re.M)
    )
