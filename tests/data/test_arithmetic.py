"""Word problems: correct references, a held-out split without overlap, demonstrations of the configured quality."""

import re

import pytest

from rlhf.data.data import Data
from rlhf.data.encoding import encode_dialogue
from rlhf.data.testbed.arithmetic import STORIES, Arithmetic
from rlhf.data.tokenizer import train_tokenizer
from rlhf.data.tool_calls import Call, read_call
from rlhf.errors import UserError


def data(record="prompt", size=300, validation=50, **hyperparameters):
    return Data(record, "arithmetic", size, validation, 128, arithmetic=Arithmetic(**hyperparameters))


def test_references_are_correct():
    """The result is recomputed from the text alone."""
    split = data().load()
    assert len(split.train) == 300 and len(split.validation) == 50
    for prompt in [*split.train, *split.validation]:
        a, b = map(int, re.findall(r"\d+", prompt.messages[0].content))
        minus = re.search(r"minus|loses|takes|sells", prompt.messages[0].content)
        assert int(prompt.reference) == (a - b if minus else a + b) >= 0


def test_the_same_seed_gives_the_same_problems():
    assert data().load().train == data().load().train
    other = Data("prompt", "arithmetic", 300, 50, 128, seed=1).load()
    assert other.train != data().load().train
    assert data().digest() == data().digest() != data(seed=1).digest()
    assert data(careless=0.5).digest() != data().digest() != data(calls=0.5).digest() != data(largest=5).digest()


def test_held_out_problems_occur_nowhere_else():
    """A held-out problem's sum occurs in other stories, and its story with other sums."""
    world = Arithmetic()
    rng = world._rng("test")
    held_out = {problem.key for problem in world.problems(150, rng, held_out=True)}
    seen = {problem.key for problem in world.problems(4000, rng)}
    assert not held_out & seen
    assert {key[:3] for key in held_out} <= {key[:3] for key in seen}
    asked = {prompt.messages for prompt in data().load().validation}
    demonstrated = {record.messages[:1] for record in data("demonstration", 3000).load().train}
    written = " ".join(text.text for text in data("text", 3000).load().train)
    assert not asked & demonstrated
    assert not any(messages[0].content in written for messages in asked)
    assert len(asked) == 50


def test_careless_is_the_fraction_of_wrong_results():
    for careless in (0.0, 0.3):
        world = Arithmetic(careless=careless)
        rng = world._rng("test")
        wrong = 0
        for problem in world.problems(2000, rng):
            (turn,) = world.turns(problem, rng)
            wrong += not turn.content.endswith(f" {problem.result}.")
        assert wrong / 2000 == pytest.approx(careless, abs=0.03)


def test_calls_are_dialogues_with_a_tool():
    world = Arithmetic(calls=1.0, careless=0.0)
    for record in world.demonstrations(50, 0):
        user, call, answer, response = record.messages
        assert [message.role for message in record.messages] == ["user", "assistant", "tool", "assistant"]
        read = read_call(call.content)
        assert read is not None and read.tool == "calculator"
        assert str(eval(read.argument)) == answer.content  # generated text: digits and a sign
        assert response.content.endswith(f" {answer.content}.")
    share = sum(len(record.messages) > 2 for record in Arithmetic(calls=0.4).demonstrations(1000, 0)) / 1000
    assert share == pytest.approx(0.4, abs=0.05)


def test_tool_tokens_are_masked_in_sft():
    """SFT's mask covers the assistant's tokens, the end of its turns included, and no token of the tool."""
    record = Arithmetic(calls=1.0, careless=0.0).demonstrations(1, 0)[0]
    tokenizer = train_tokenizer(data("demonstration", calls=1.0).load().texts(), 400)
    row = encode_dialogue(tokenizer, record.messages)
    learnt = tokenizer.decode([token for token, counts in zip(row.ids, row.mask, strict=True) if counts])
    assert learnt == f"{record.messages[1].content}<|end|>{record.messages[3].content}<|end|>"


def test_rows_fit_the_length_of_the_option():
    split = data("demonstration", 1000, 10, calls=0.5).load()
    tokenizer = train_tokenizer(split.texts(), 512)
    assert max(len(encode_dialogue(tokenizer, record.messages)) for record in split.train) <= 64


def test_missing_records_and_problems_are_reported():
    with pytest.raises(
        UserError,
        match="arithmetic: has no comparisons, only texts, demonstrations and prompts; type another data.source",
    ):
        data("comparison").load()
    with pytest.raises(UserError, match="data.arithmetic.largest"):
        data(validation=3000, largest=2).load()
    # With seed 0, 0+0 and 0-0 are held out in the stories without names: one text each.
    assert len(data(validation=2, largest=0).load().validation) == 2
    with pytest.raises(UserError, match="numbers up to 0 make only 2 held-out problems; type data.validation=2 or"):
        data(validation=3, largest=0).load()
    assert set(STORIES) == {"+", "-"} and len({len(stories) for stories in STORIES.values()}) == 1


@pytest.mark.parametrize(
    "turn, call",
    [
        ("<call>calculator(3+4)</call>", Call("calculator", "3+4")),
        ("Let me see. <call> search ( home of Mia ) </call>\n", Call("search", "home of Mia")),
        ("<call>calculator((3+4)*2)</call>", Call("calculator", "(3+4)*2")),
        ("<call>a(1)</call> <call>b(2)</call>", Call("b", "2")),
        ("<call>calculator()</call>", Call("calculator", "")),
        ("<call>calculator(3+4)</call> It is 7.", None),  # a call must end its turn
        ("<call>calculator(3+4)", None),
        ("<call>3+4</call>", None),
        ("It is 7.", None),
        ("", None),
    ],
)
def test_calls_are_parsed(turn, call):
    assert read_call(turn) == call
    assert call is None or read_call(str(call)) == call
