"""Chat: the model reads the whole dialogue through its template; nothing is dropped silently."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.data.records import Message, Prompt
from rlhf.evaluation.compare import load_policy
from rlhf.models.language_model import LanguageModel
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.using.chat import Chat, ContextFull

Typed = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def model(outputs: Path) -> LanguageModel:
    return load_policy(outputs / "sft" / "none0" / "model")


def answer(model: LanguageModel, *messages: Message) -> str:
    """Return the greedy response of the stages' sampler."""
    return AncestralSampler(8, temperature=0.0).sample(model, [Prompt(messages)], 0).texts[0]


def test_each_response_depends_on_all_earlier_turns(model: LanguageModel) -> None:
    chat = Chat(model, AncestralSampler(8, temperature=0.0), system="Be brief.")
    first = "".join(chat.respond("What is two plus two?"))
    seen = [Message("system", "Be brief."), Message("user", "What is two plus two?")]
    assert first.strip() == answer(model, *seen)
    seen += [Message("assistant", first.strip()), Message("user", "Who?")]
    assert "".join(chat.respond("Who?")).strip() == answer(model, *seen)
    chat.reset()
    assert "".join(chat.respond("Who?")).strip() == answer(model, seen[0], seen[-1])
    chat.reset(system="")
    assert "".join(chat.respond("Who?")).strip() == answer(model, seen[-1])
    assert len(chat.turns) == 2


def test_responses_follow_the_seed(model: LanguageModel) -> None:
    def dialogue(seed: int) -> list[str]:
        chat = Chat(model, AncestralSampler(8), seed=seed)
        return ["".join(chat.respond("Who?")) for _ in range(2)]

    assert dialogue(1) == dialogue(1) != dialogue(2)


def test_a_full_context_is_reported_and_nothing_is_dropped(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(model, AncestralSampler(1000, temperature=0.0))
    with monkeypatch.context() as patch:
        patch.setattr(model, "end_id", -1)  # a policy that never ends its turn
        "".join(chat.respond("Who? " * 20))
    assert "context of 128 tokens is full" in chat.cut and chat.used == 128
    before = list(chat.turns)
    with pytest.raises(ContextFull, match="type /reset"):
        "".join(chat.respond("And now? " * 30))
    assert chat.turns == before
    chat.reset()
    assert "".join(chat.respond("Who?")) and chat.turns[0] == Message("user", "Who?")


def test_lines_of_a_pipe_get_one_response_each(
    rlhf: Typed, outputs: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = "Hello\n\n/reset\n/nonsense\nHello\n/quit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(turns))
    status, out = rlhf("chat", outputs / "sft" / "none0", "--temperature", 0, "--max-new-tokens", 8)
    response = answer(model, Message("user", "Hello"))
    assert status == 0 and out.count(response) == 2 and response
    assert "/nonsense: no such command" in out


def test_a_reward_model_is_refused_in_chat(rlhf: Typed, outputs: Path) -> None:
    status, out = rlhf("chat", outputs / "reward_model" / "b0")
    assert status == 2 and "is a reward or value model, which generates no text; type a run of a policy" in out
