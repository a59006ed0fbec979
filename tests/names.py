"""Names of all tests, for tables that refer to them."""

import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@cache
def known() -> frozenset[str]:
    """Return `tests/folder/file.py::test_name` of every test."""
    return frozenset(
        f"{path.relative_to(ROOT).as_posix()}::{name}"
        for path in ROOT.glob("tests/**/test_*.py")
        for name in re.findall(r"^\s*(?:async )?def (test_\w+)", path.read_text(encoding="utf-8"), re.M)
    )


def stage_files() -> list[Path]:
    """YAML files of the stages that have a class of their own; the others are variants, such as gated_ppo."""
    return [path for path in sorted(ROOT.glob("plugins/*/conf/stage/*.yaml")) if "_target_: " in path.read_text()]
