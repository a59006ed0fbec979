"""Shared fixtures and hooks of all tests: clean and fast test processes."""

import copy
import gc
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra._internal import defaults_list
from hydra.core.default_element import InputDefault
from matplotlib.backends.backend_agg import FigureCanvasAgg
from omegaconf import OmegaConf

from rlhf.running import pipeline

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests for a GPU without one; put files of slow tests first, then those with many tests.

    So no worker ends with a long file.
    """
    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if for_gpu and not torch.cuda.is_available():
        for item in for_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    count = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -count[item.path], item.path))


def pytest_collection_finish() -> None:
    """Exclude imported objects from later garbage collections, and collect rarely: a config takes 10^5 objects.

    Half a million imported objects are never freed.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def _freeze_imports() -> Iterator[None]:
    """Exclude the objects that a test module imported from later garbage collections."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _parsed_once() -> Iterator[None]:
    """Parse each YAML file of the project once: configs are composed a thousand times here, from thirty files each."""
    load = OmegaConf.load
    known = cache(lambda path: load(path))

    def copied(source: Any) -> Any:
        path = Path(source if isinstance(source, str | Path) else source.name).absolute()  # Hydra passes an open file
        return copy.deepcopy(known(path)) if path.is_relative_to(ROOT) else load(source)

    OmegaConf.load = staticmethod(copied)  # type: ignore[method-assign]
    yield
    OmegaConf.load = staticmethod(load)  # type: ignore[method-assign]


@pytest.fixture(autouse=True, scope="session")
def _interpolated_if_asked() -> Iterator[None]:
    """Build Hydra's map of choices, one for every node of the defaults tree, only where a choice refers to another."""
    make, resolve = defaults_list._create_interpolation_map, InputDefault._resolve_interpolation_impl
    defaults_list._create_interpolation_map = lambda *arguments: partial(make, *arguments)  # type: ignore[assignment]
    InputDefault._resolve_interpolation_impl = lambda self, choices, value: resolve(self, choices(), value)  # type: ignore[assignment]
    yield
    defaults_list._create_interpolation_map, InputDefault._resolve_interpolation_impl = make, resolve  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def _silence_untested_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence warnings of untested versions: `make test-newest` runs the tests with those, and tests count lines."""
    monkeypatch.setattr(pipeline, "untested", lambda: None)


@pytest.fixture(autouse=True)
def _restore_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore ``sys.path`` after each test: a command adds the directory in which it is typed."""
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def figures() -> None:
    """Request figures with content, which ``undrawn`` would leave empty."""


@pytest.fixture
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures of runs empty: drawing one takes longer than training a tiny model."""

    if "figures" not in request.fixturenames:
        monkeypatch.setattr(FigureCanvasAgg, "print_png", lambda _, path, **__: Path(path).write_bytes(b""))
