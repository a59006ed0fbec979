"""Finished InstructGPT pipeline that the tests share, with a model of 30 thousand weights."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.commands import Command, Done, start_server

MODEL = [
    "recipe=testbed",
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "model.architecture.num_hidden_layers=2",
    "model.architecture.num_attention_heads=2",
    "model.architecture.num_key_value_heads=2",
    "model.architecture.max_position_embeddings=128",
    "model.vocab_size=320",
]
COMPARE = ["compare.count=8", "compare.max_new_tokens=8"]
POLICIES = [
    "pretrain.data.size=128",
    "pretrain.stage.context=64",
    "pretrain.stage.batch_size=16",
    "sft.data.size=64",
    "sft.stage.batch_size=32",
    "sft.stage.epochs=1",
    "collect.data.size=32",
    "collect.sampler.max_new_tokens=8",
]
REWARD = ["reward_model.stage.batch_size=16"]
PPO = [
    "align.data.size=32",
    "align.data.validation=8",
    "align.sampler.max_new_tokens=8",
    "align.stage.steps=2",
    "align.stage.batch_size=8",
    "align.stage.minibatches=2",
    "align.stage.epochs=1",
]
DPO = ["align.stage.batch_size=16"]


@pytest.fixture(scope="session")
def _server() -> None:
    start_server()


@pytest.fixture
def start(_server: None) -> Iterator[Callable[..., Command]]:
    """Start ``rlhf WORDS`` in a directory; kill what still runs at the end of the test."""
    begun: list[Command] = []

    def begin(folder: Path, *words: str) -> Command:
        begun.append(Command(folder, list(words)))
        return begun[-1]

    yield begin
    for command in begun:
        command.kill()


@pytest.fixture
def rlhf(start: Callable[..., Command]) -> Callable[..., Done]:
    """Run ``rlhf WORDS`` in a directory to its end."""
    return lambda folder, *words: start(folder, *words).wait()


@pytest.fixture(scope="session")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory in which the shared pipeline was run."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def pipeline(workdir: Path, _server: None) -> Done:
    """Run ``pipeline=instructgpt`` to its end."""
    done = Command(workdir, ["pipeline=instructgpt", *MODEL, *POLICIES, *REWARD, *PPO, *COMPARE]).wait()
    assert done.status == 0, done.out + done.err
    return done
