"""One finished InstructGPT pipeline that the tests share, with a model of 30 thousand weights."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.commands import Command, Done, start_server

MODEL = [
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
    "collect.rollout.max_new_tokens=8",
]
REWARD = ["reward_model.stage.batch_size=16"]
PPO = [
    "align.data.size=32",
    "align.data.validation=8",
    "align.rollout.max_new_tokens=8",
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
    """Starts ``rlhf WORDS`` in a folder; what still runs at the end of the test is killed."""
    begun: list[Command] = []

    def begin(folder: Path, *words: str) -> Command:
        begun.append(Command(folder, list(words)))
        return begun[-1]

    yield begin
    for command in begun:
        command.kill()


@pytest.fixture
def rlhf(start: Callable[..., Command]) -> Callable[..., Done]:
    """Runs ``rlhf WORDS`` in a folder to its end."""
    return lambda folder, *words: start(folder, *words).wait()


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the shared pipeline was run."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def pipeline(home: Path, _server: None) -> Done:
    """``pipeline=instructgpt``, whole."""
    done = Command(home, ["pipeline=instructgpt", *MODEL, *POLICIES, *REWARD, *PPO, *COMPARE]).wait()
    assert done.status == 0, done.out + done.err
    return done
