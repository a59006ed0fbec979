"""Language model as annotator: its questions, the parsing of its answers, and the treatment of unreadable answers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.annotator.judge import JudgeAnnotator, encode_completion_question
from rlhf.annotator.judge_text import TEMPLATES, fill, parse, read_template
from rlhf.data.collate import TokenBatch
from rlhf.data.records import Message
from rlhf.data.rendering import tokenize
from rlhf.data.tokenizer import train_tokenizer
from rlhf.errors import UserError
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.rollout import Rollout
from rlhf.testing import check_annotator, tiny_model

from .conftest import Scripted, given, longer

# -- questions ------------------------------------------------------------------------------------------------------


def test_a_template_is_filled_once_and_keeps_other_braces() -> None:
    assert fill("{prompt}|{first}|{second}", [Message("user", "q {first}")], "{second}", "b") == "q {first}|{second}|b"
    dialogue = [Message("user", "one"), Message("assistant", "two"), Message("user", "three")]
    assert fill("{prompt}", dialogue, "", "") == "user: one\nassistant: two\nuser: three"


@pytest.mark.parametrize("merged", [True, False])
def test_option_tokens_without_a_chat_template_are_those_that_continue_the_text(merged: bool) -> None:
    """GPT-2's byte-level BPE writes "Answer: A" with the token " A"; after "Answer: " no token of a text is "A"."""
    corpus = ["Answer: A\nAnswer: B\n"] * 9 if merged else ["xyz"]
    tokenizer = train_tokenizer(corpus, 300 if merged else 262)
    context, options = encode_completion_question(tokenizer, "Which?\nA: x\nB: y")
    assert tokenizer.decode(context) == "Which?\nA: x\nB: y\nAnswer:" + ("" if merged else " ")
    assert tokenizer.convert_ids_to_tokens(options) == (["ĠA", "ĠB"] if merged else ["A", "B"])
    for option, name in zip(options, "AB", strict=True):
        assert [*context, option] == tokenize(tokenizer, f"Which?\nA: x\nB: y\nAnswer: {name}")


def test_a_judge_without_chat_template_adds_the_probabilities_of_both_tokens(tmp_path: Path) -> None:
    model = tiny_model(("Answer: A", "Answer: B") * 50)
    model.tokenizer.chat_template = None
    model.save(tmp_path / "model")
    judge = JudgeAnnotator(str(tmp_path / "model"), template="short", least_mass=0.0)
    assert judge.model.tokenizer.convert_ids_to_tokens(judge.option_ids) == ["ĠA", "ĠB"]
    ((value, _),) = judge.ask(["Which?"])
    ids = torch.tensor([tokenize(model.tokenizer, "Which?\nAnswer:")])
    hidden = model.hidden(TokenBatch.of(ids, torch.ones_like(ids), position_ids=torch.arange(ids.shape[1])[None]))
    logits = model.head(hidden)[0, -1].detach()
    tokens = {name: [x for x in (f"Ġ{name}", name) if x in model.tokenizer.get_vocab()] for name in "AB"}
    assert all(
        len(found) == 2 for found in tokens.values()
    )  # " A" and "A" are one answer: their probabilities are added
    ids_of = {name: model.tokenizer.convert_tokens_to_ids(found) for name, found in tokens.items()}
    first, second = (logits[ids_of[name]].exp().sum().log() for name in "AB")
    assert value == pytest.approx(float(first - second), abs=1e-4)


def test_templates_are_read_by_name_or_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("{prompt} {first} {second} ?")
    assert read_template(str(file), "key").endswith("?") and read_template("short", "key") == TEMPLATES["short"]
    file.write_text("{prompt} {first}")
    with pytest.raises(UserError, match=r"mine.txt: lacks \{second\}"):
        read_template(str(file), "key")
    with pytest.raises(UserError, match="^data.template=shrot: no such template; type one of short, instruction"):
        read_template("shrot", "data.template")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("A", 1.0),
        ("B.", -1.0),
        ("The better response is B", -1.0),
        ("A is better than B. [[B]]", -1.0),
        ("[[C]]", 0.0),
        ("It is a tie", 0.0),
        ("A and B are fine", None),
        ("", None),
        ("Apples", None),
        # an article, not an option
        ("A tie.", 0.0),
        ("A draw", 0.0),
        ("A tie between A and B", 0.0),
        ("A close call, but B is better.", -1.0),
        ("A slightly better answer is B", -1.0),
        ("A more helpful response is B", -1.0),
        ("A tough one. A wins.", 1.0),
        ("Answer: A tie", 0.0),
        # an option, not an article
        ("A wins", 1.0),
        ("A explains it better", 1.0),
        ("A clearly wins", 1.0),
        ("A helped more", 1.0),
        ("A, because it is right", 1.0),
        ("**A**", 1.0),
        ("(A)", 1.0),
        ("A) Paris", 1.0),
        ("Response A is better.", 1.0),
        # both options are named
        ("A is better than B", 1.0),
        ("B is worse than A", 1.0),
        ("A is good, but B is better.", -1.0),
        ("I prefer A to B", 1.0),
        ("B over A", -1.0),
        ("Neither A nor B is better", 0.0),
        ("A and B are equally good", 0.0),
        ("A because B is wrong", None),
        ("A > B", 1.0),
        ("A < B", -1.0),
        ("A beats B", 1.0),
        ("Answer: B. A is too long.", -1.0),
        ("The winner is response A, not B", 1.0),
        ("Answer: A and B are equal", 0.0),
        ("b", -1.0),
        ("(a)", 1.0),
        ("a good one", None),
        # negated options
        ("Not A", None),
        ("A is not better", None),
        ("It is not a tie: B is better", -1.0),
    ],
)
def test_written_answers_are_parsed(text: str, value: float | None) -> None:
    assert parse(text) == value


# -- verdicts -------------------------------------------------------------------------------------------------------


def test_both_orders_are_queried_and_averaged(folder: Path) -> None:
    judge = Scripted(
        folder, lambda a, b: 3.0 if a == "good" else -1.0
    )  # larger log-odds for whichever response comes first
    (made,) = judge(given("bad", "good"), 2, 0)
    assert judge.calls == 2
    assert made.responses == ("good", "bad") and made.grades == ("significantly",)
    assert made.scores == pytest.approx((1.0, -1.0))  # (3 + 1) / 2 = 2 nats between them
    assert judge.rates(judge.counts) == {
        "judge/pairs": 1,
        "judge/ties": 0.0,
        "judge/position_bias": 0.0,
        "judge/first_choice": 0.5,
        "judge/unreadable": 0.0,
        "judge/intransitive": 0.0,
    }


def test_a_judge_with_position_bias_yields_ties(folder: Path) -> None:
    judge = Scripted(folder, lambda a, b: 2.0)
    assert judge(given("one", "two", "x", "yy"), 2, 0) == []
    rates = judge.rates(judge.counts)
    assert rates["judge/position_bias"] == rates["judge/ties"] == rates["judge/first_choice"] == 1.0


def test_one_order_halves_the_questions_and_measures_no_bias(folder: Path) -> None:
    judge = Scripted(folder, lambda a, b: 2.0, both_orders=False)
    (made,) = judge(given("one", "two"), 2, 0)
    assert judge.calls == 1 and made.responses == ("one", "two")


def test_equal_responses_are_not_judged(folder: Path) -> None:
    judge = Scripted(folder, longer)
    assert judge(given("same", "same"), 2, 0) == [] and judge.calls == 0


def test_a_ranking_is_fitted_to_its_pairs(folder: Path) -> None:
    judge = Scripted(folder, longer)
    (made,) = judge(given("aa", "a", "aaaa", "aaa"), 4, 0)
    assert made.responses == ("aaaa", "aaa", "aa", "a")
    assert judge.calls == 12 and len(made.pairs()) == 6
    gaps = [a - b for a, b in zip(made.scores, made.scores[1:], strict=False)]
    assert gaps == pytest.approx([1.0, 1.0, 1.0])  # least squares recovers additive log-odds
    assert made.grades[0] == "better" and made.grades[2] == "significantly"  # 1 and 3 nats


def test_truncated_responses_stay_marked(folder: Path) -> None:
    cut = given("four", "four, sure", "four, I")
    cut.ended[2] = False
    (comparison,) = Scripted(folder, longer)(cut, 3, 0)
    assert comparison.responses == ("four, sure", "four, I", "four") and comparison.ended == (True, False, True)


def test_an_intransitive_pair_becomes_a_tie(folder: Path) -> None:
    odds = {("a", "b"): 2.0, ("b", "c"): 2.0, ("c", "a"): 1.0}
    judge = Scripted(folder, lambda x, y: odds.get((x, y)) or -odds[y, x])
    (made,) = judge(given("a", "b", "c"), 3, 0)
    assert made.responses == ("a", "b", "c")
    assert [pair[:2] for pair in made.pairs()] == [(0, 1), (1, 2)]  # a over c would contradict the judge
    assert judge.counts["intransitive"] == 1


def test_thresholds_set_grades_and_written_answers_have_none(folder: Path) -> None:
    judge = Scripted(folder, lambda a, b: 0.7 if a == "good" else -0.7, thresholds=(0.1, 0.6, 5.0))
    assert judge(given("bad", "good"), 2, 0)[0].grades == ("better",)
    judge.answer = "generate"
    assert judge(given("bad", "good"), 2, 0)[0].grades == (None,)


# -- unreadable answers -----------------------------------------------------------------------------------------------


def test_a_few_unreadable_answers_are_ties(folder: Path) -> None:
    judge = Scripted(folder, lambda a, b: None if "?" in (a, b) else longer(a, b))
    responses = ["a" * i for i in range(1, 21)] + ["?", "b"]
    made = judge(given(*responses), 2, 0)
    assert len(made) == 10 and judge.counts["ties"] == 1
    assert judge.rates(judge.counts)["judge/unreadable"] == pytest.approx(2 / 22)


def test_too_many_unreadable_answers_are_refused_in_one_line(folder: Path) -> None:
    judge = Scripted(folder, lambda a, b: None)
    responses = [f"{i}" for i in range(40)]
    with pytest.raises(UserError) as error:
        judge(given(*responses), 2, 0)
    line = str(error.value)
    assert "40 of 40 answers are neither A nor B, for example '?', and annotator.max_unreadable=0.1 allows 4" in line
    assert "\n" not in line


def test_an_untrained_model_is_refused_as_a_judge(folder: Path) -> None:
    """A and B together have about 2 in 300 of its probability."""
    with pytest.raises(UserError, match="neither A nor B"):
        JudgeAnnotator(str(folder), "short")(given(*[f"response {i}" for i in range(40)]), 2, 0)


def test_a_question_too_long_for_the_judge_counts_as_unreadable(folder: Path) -> None:
    judge = JudgeAnnotator(str(folder), "short", least_mass=0.0)
    (answer,) = judge.ask(["word " * 200])
    assert answer[0] is None and "more than 127 tokens" in answer[1]


# -- a real model ---------------------------------------------------------------------------------------------------


def test_log_odds_are_those_of_the_next_token_at_any_batch_size(folder: Path) -> None:
    from rlhf.data.encoding import encode_prompt

    judge = JudgeAnnotator(str(folder), "short", least_mass=0.0)
    questions = [fill(judge.template, [Message("user", "q" * n)], "one", "two") for n in (1, 9, 4)]
    told: list[int] = []
    answers = judge.ask(questions, told.append)
    assert sum(told) == 3 and judge.ask(questions) == answers
    for question, (odds, _) in zip(questions, answers, strict=True):
        ids = torch.tensor([encode_prompt(judge.model.tokenizer, [Message("user", question)])])
        logits = judge.model.base(input_ids=ids).logits[0, -1]
        one, two = (judge.model.tokenizer(x, add_special_tokens=False)["input_ids"][0] for x in "AB")
        assert odds == pytest.approx(float(logits[one] - logits[two]), abs=1e-4)


def test_a_real_model_passes_the_annotator_contract(folder: Path) -> None:
    assert check_annotator(JudgeAnnotator(str(folder), "short", least_mass=0.0)) == []
    assert check_annotator(JudgeAnnotator(str(folder), "short", answer="generate", max_unreadable=1.0)) == []


# -- the cache ------------------------------------------------------------------------------------------------------


def test_no_question_is_judged_twice(folder: Path, tmp_path: Path) -> None:
    responses = given("aa", "a", "bbb", "b")
    first = Scripted(folder, longer)
    first.open(tmp_path)
    made = first(responses, 2, 0)
    assert first.calls == 4
    again = Scripted(folder, lambda a, b: pytest.fail("asked again"))
    again.open(tmp_path)
    assert again(responses, 2, 0) == made
    (file,) = tmp_path.iterdir()
    with file.open("a") as stream:
        stream.write('{"question": "abc", "ans')  # a kill in the middle of a line
    third = Scripted(folder, lambda a, b: pytest.fail("asked again"))
    third.open(tmp_path)
    assert third(responses, 2, 0) == made


def test_question_template_and_judge_are_in_the_cache_key(folder: Path, tmp_path: Path) -> None:
    judge = JudgeAnnotator(str(folder), "short", least_mass=0.0)
    other = tmp_path / "other"
    tiny_model(seed=1).save(other)
    assert JudgeAnnotator(str(other), "short").identity != judge.identity
    assert JudgeAnnotator(str(folder), "instruction").identity == judge.identity
    one, two = judge._key("a"), judge._key("b")
    judge.answer = "generate"
    assert len({one, two, judge._key("a")}) == 3


def test_the_cache_can_be_disabled(folder: Path, tmp_path: Path) -> None:
    judge = Scripted(folder, longer, cache=False)
    judge.open(tmp_path)
    judge(given("aa", "a"), 2, 0)
    assert list(tmp_path.iterdir()) == []


def test_max_new_tokens_and_dtype_reach_the_judge(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    inner = AncestralSampler.sample

    def sample(self: AncestralSampler, *arguments: Any, **named: Any) -> Rollout:
        lengths.append(self.max_new_tokens)
        written = inner(self, *arguments, **named)
        assert written.mask.shape[1] <= self.max_new_tokens
        return written

    monkeypatch.setattr(AncestralSampler, "sample", sample)
    for length in (1, 12):
        judge = JudgeAnnotator(str(folder), answer="generate", max_new_tokens=length, max_unreadable=1.0)
        judge.ask(["Which is better, A or B?", "Is it A?"])
    assert lengths == [1, 12]
    halved = JudgeAnnotator(str(folder), dtype="bfloat16")
    assert {next(one.model.base.parameters()).dtype for one in (judge, halved)} == {torch.float32, torch.bfloat16}
