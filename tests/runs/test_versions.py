"""A library outside the tested range costs one line of output and no run."""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from rlhf.running import versions

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Libraries whose internals this project touches: patched, subclassed, or read beyond their documented interface.
BOUNDED = {"torch", "pytorch-lightning", "transformers", "peft", "bitsandbytes", "hydra-core", "omegaconf", "datasets"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Patch the installed versions that metadata reports; the newest of every range at first."""
    known = {"torch": "2.13.0+cpu", "transformers": "5.24.0", "rich": "15.0.0"}
    needed = ["torch>=2.13,<2.14", "transformers>=5,<5.25", "rich>=14", "absent<2", 'trl==1.16.*; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda name: needed)

    def version(name: str) -> str:
        if name not in known:
            raise metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(metadata, "version", version)
    return known


def test_inside_the_range_nothing_is_printed(installed: dict[str, str]) -> None:
    assert versions.untested() is None
    installed["rich"] = "99.0"  # has no upper bound
    installed["trl"] = "0.1"  # used by the tests only
    assert versions.untested() is None


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ({"transformers": "5.25.0"}, "transformers 5.25.0 (tested: >=5,<5.25)"),
        ({"transformers": "4.57.1"}, "transformers 4.57.1 (tested: >=5,<5.25)"),
        ({"torch": "2.14.0+cu130"}, "torch 2.14.0+cu130 (tested: >=2.13,<2.14)"),
        ({"torch": "2.12.1", "transformers": "6.0.0"}, "torch 2.12.1 (tested: >=2.13,<2.14), transformers 6.0.0"),
    ],
)
def test_outside_the_range_one_line_names_it(installed: dict[str, str], found: dict[str, str], named: str) -> None:
    installed |= found
    line = versions.untested()
    assert line is not None and line.startswith("warning: ") and named in line and "\n" not in line


def test_without_an_installation_no_range_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert versions.untested() is None


def test_libraries_with_patched_internals_have_an_upper_bound() -> None:
    requirements = {r.name: r.specifier for r in map(Requirement, PROJECT["dependencies"])}
    assert all(any(part.operator == "<" for part in requirements[name]) for name in BOUNDED)


def test_the_constraints_satisfy_every_requirement() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    locked = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in locked.items()}
    for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]:
        one = Requirement(text)
        assert one.specifier.contains(Version(pinned[canonicalize_name(one.name)])), text
    assert not any("+" in version or name.startswith(("nvidia", "triton")) for name, version in pinned.items())


def test_the_version_check_imports_no_library() -> None:
    code = "import sys, rlhf.running.versions as v; v.untested(); assert not {*sys.modules} & {'torch', 'transformers'}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_run_names_the_numeric_libraries_that_have_changed_since(installed: dict[str, str]) -> None:
    made = {"torch": "2.13.0+cpu", "transformers": "5.23.1", "hydra-core": "1.0", "python": "3.9.0"}
    assert versions.differing(made) == " (made with transformers 5.23.1, now 5.24.0)"
    assert versions.differing({**made, "transformers": "5.24.0"}) == ""
    assert versions.differing({"peft": "0.21.0"}) == " (made with peft 0.21.0, now not installed)"
