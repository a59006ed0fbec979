"""Model of 30 thousand weights on the testbed, to inspect and to train."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.inspection.composing import Look, planned

MODEL = [
    "recipe=testbed",
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "model.architecture.num_hidden_layers=2",
    "model.architecture.num_attention_heads=2",
    "model.architecture.num_key_value_heads=1",
    "model.architecture.max_position_embeddings=128",
    "model.vocab_size=320",
]
SMALL = ["data.size=24", "data.validation=8", "stage.batch_size=8"]


@pytest.fixture(autouse=True)
def isolated_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write outputs to the test's own directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def looked() -> Callable[..., Look]:
    """Return a function: words -> the steps of that command line, with the small model."""
    return lambda *words: Look(planned([*words, *MODEL]).steps)
