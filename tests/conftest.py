"""What all tests share: a process as clean as at its start, and as quick."""

import copy
import gc
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from hydra._internal import defaults_list
from hydra.core.default_element import InputDefault
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from rlhf import pipeline

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files of slow tests first, then those of many tests: of two processes, none is left with a long file."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    count = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -count[item.path], item.path))


def pytest_collection_finish() -> None:
    """Take what was imported out of every later garbage collection: half a million objects that never go."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> Iterator[None]:
    """The same for what a module of tests imported."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _parsed_once() -> Iterator[None]:
    """Parse each YAML file of the project once: a config is composed a thousand times here, of thirty files each."""
    load = OmegaConf.load
    known = cache(lambda path: load(path))

    def copied(source: Any) -> Any:
        path = Path(source if isinstance(source, str | Path) else source.name).absolute()  # Hydra gives an open file
        return copy.deepcopy(known(path)) if path.is_relative_to(ROOT) else load(source)

    OmegaConf.load = staticmethod(copied)  # type: ignore[method-assign]
    yield
    OmegaConf.load = staticmethod(load)  # type: ignore[method-assign]


@pytest.fixture(autouse=True, scope="session")
def _interpolated_if_asked() -> Iterator[None]:
    """Make Hydra's map of choices, one for every node of the defaults tree, only where a choice refers to another."""
    make, resolve = defaults_list._create_interpolation_map, InputDefault._resolve_interpolation_impl
    defaults_list._create_interpolation_map = lambda *arguments: partial(make, *arguments)  # type: ignore[assignment]
    InputDefault._resolve_interpolation_impl = lambda self, choices, value: resolve(self, choices(), value)  # type: ignore[assignment]
    yield
    defaults_list._create_interpolation_map, InputDefault._resolve_interpolation_impl = make, resolve  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def _newest_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say nothing of untested versions: `make test-newest` runs the tests with those, and they count lines."""
    monkeypatch.setattr(pipeline, "untested", lambda: None)


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the folder in which a test typed its commands; a command puts it on the path of modules."""
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def figures() -> None:
    """Ask for figures with something in them, where ``undrawn`` would leave them empty."""


@pytest.fixture
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures of runs empty: drawing one takes longer than training a tiny model."""

    def leave(figure: Figure, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"")

    if "figures" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", leave)
