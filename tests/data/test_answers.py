"""Answers as models write them: a table of pairs, each equal or different."""

import itertools
import json
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest

from rlhf.reward.answers import last_number, number, readings, same
from rlhf.reward.exact_match import ExactMatch

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k_train_1000.jsonl"

EQUAL = [
    # grouping
    ("1,000", "1000"),
    ("10 000", "10000"),
    ("1 234 567", "1234567"),
    ("10\u202f000", "10000"),
    ("10\u00a0000", "10000"),
    ("1,234,567.50", "1234567.5"),
    (r"10{,}000", "10000"),
    (r"10\,000", "10000"),
    # decimals and powers of ten
    ("1000.0", "1000"),
    (".5", "0.5"),
    ("7.", "7"),
    ("0.50", ".5"),
    ("1e5", "100000"),
    ("1E5", "100000"),
    ("1.5e3", "1500"),
    ("2e-3", "0.002"),
    ("3 x 10^4", "30000"),
    (r"3 \times 10^{4}", "30000"),
    ("3×10^4", "30000"),
    # signs
    ("−5", "-5"),
    ("–5", "-5"),
    ("+5", "5"),
    ("-$3", "-3"),
    ("$-3", "-3"),
    ("\uff0d5", "-5"),
    # currencies and units
    ("$1000", "1000"),
    ("€72", "72"),
    ("£ 72", "72"),
    ("72 dollars", "72"),
    ("$72 in total", "72"),
    ("72 km/h", "72"),
    ("72kg", "72"),
    ("3 cm²", "3"),
    ("72 dollars", "72 dollars"),
    ("5 m", "5"),
    ("72 clips.", "72"),
    # emphasis and LaTeX dressing
    ("**72**", "72"),
    ("72**", "72"),
    ("*72*", "72"),
    ("`72`", "72"),
    ("__72__", "72"),
    ("$72$", "72"),
    (r"\(72\)", "72"),
    (r"\boxed{72}", "72"),
    (r"$\boxed{72}$", "72"),
    (r"\boxed{72\text{ dollars}}", "72"),
    (r"\text{72}", "72"),
    (r"\$72", "72"),
    # fractions
    ("3/4", "0.75"),
    ("3 / 4", "0.75"),
    (r"\frac{3}{4}", "3/4"),
    (r"\dfrac34", "0.75"),
    (r"-\frac{1}{2}", "-0.5"),
    ("2000/2", "1000"),
    ("3 1/2", "3.5"),
    (r"3\frac{1}{2}", "7/2"),
    ("½", "0.5"),
    ("2½", "2.5"),
    ("-3 1/2", "-3.5"),
    # per cent
    ("50%", "50"),
    ("50%", "0.5"),
    ("50%", "50%"),
    (r"50\%", "1/2"),
    ("50 percent", "50%"),
    ("0.5", "50%"),
    ("12.5%", "1/8"),
    # number words
    ("5 million", "5000000"),
    ("2.5 thousand", "2500"),
    ("$1.2 billion", "1.2e9"),
    # other mathematics, compared by math-verify
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    (r"\sqrt{16}", "4"),
    ("sqrt(16)", "4"),
    (r"2\pi", r"\pi\cdot 2"),
    ("x = 5", "5"),
    ("2^{10}", "1024"),
    (r"\{1, 2\}", r"\{2, 1\}"),
    ("[0, 1)", "[0,1)"),
    ("(1, 2)", "(1,2)"),
    ("x^2 + 2x + 1", "(x+1)^2"),
    ("3+4", "7"),
    # text
    ("Rome", " rome "),
    ("**Rome**", "Rome"),
    ("North  pole", "north pole"),
]

DIFFERENT = [
    ("1 2", "12"),
    ("1 2", "2"),
    ("1,2", "12"),
    ("1, 2", "12"),
    ("12,34", "1234"),
    ("3 4 5", "5"),
    ("1 2 3", "6"),
    ("5", "-5"),
    ("−5", "5"),
    ("1e5", "1"),
    ("1e5", "15"),
    ("10 000", "0"),
    ("10 000", "10"),
    ("50%", "0.05"),
    ("50%", "5"),
    ("50%", "0.5%"),
    ("0.5%", "0.5e1"),
    ("72 or 73", "72"),
    ("72 and 73", "72"),
    ("2pi", "2"),
    (r"2\pi", "2"),
    ("2x", "2"),
    ("5e", "5"),
    ("5 million", "5"),
    ("2 sqrt", "2"),
    ("3 thirds", "3"),
    ("Rome", "Romes"),
    ("It is Rome", "Rome"),
    ("It is 7", "7"),
    ("7 figs, no, 8.", "7"),
    ("1/0", "0"),
    ("inf", "1"),
    ("1e999999999", "1"),
    ("9" * 5000, "9"),
    ("9^9^9^9^9", "1"),
    ("99999999!", "1"),
    ("2^{99999999}", "1"),
    ("", "0"),
    ("(1, 2)", "(2, 1)"),
    ("[0, 1)", "[0, 1]"),
    (r"\frac{1}{", "1"),
    (r"\sqrt{2}", "1.41"),
    ("3 + 4", "8"),
    ("$", "0"),
    ("((((((", "1"),
    ("x", "y"),
]


@pytest.mark.parametrize(("answer", "reference"), EQUAL)
def test_equal_answers_match(answer: str, reference: str) -> None:
    assert same(answer, reference)


@pytest.mark.parametrize(("answer", "reference"), DIFFERENT)
def test_different_answers_do_not_match(answer: str, reference: str) -> None:
    assert not same(answer, reference)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It is 10 000.", 10000),
        ("That makes 1e5 in all.", 100000),
        ("The change is −5.", -5),
        ("It grew by 50%.", 50),
        ("We have 7 – 3", 3),
        ("f(4)-3", 3),
        (r"Hence \boxed{\frac{1}{2}}.", Fraction(1, 2)),
        ("**72** dollars", 72),
        ("About 5 million people.", 5_000_000),
        ("In 2020 100 people came.", 100),
        ("He ate 3 1/2 pies.", Fraction(7, 2)),
        ("Of 24 + 48 = 72\n100 are left", 100),
        ("24\n000", 0),  # a line break is not a digit separator
        ("The answer is 4 (see page 12).", 4),
        ("It took 2 hours (120 minutes).", 120),
        ("(see page 12)", 12),
    ],
)
def test_the_last_number_of_a_response_is_extracted(text: str, found: int | Fraction) -> None:
    answer = last_number(text)
    assert answer is not None and number(answer) == found


@pytest.mark.parametrize(
    ("response", "reference"),
    [
        ("#### 72 dollars", "72"),
        ("#### **72**", "72"),
        ("#### 72 (seventy-two)", "72"),
        ("**#### 72**", "72"),
        ("#### $72.00.", "72"),
        ("#### 1,072", "1072"),
        ("#### −5", "-5"),
        ("So 3.\n#### 10 000 people", "10000"),
    ],
)
def test_the_answer_after_the_marker_is_extracted(response: str, reference: str) -> None:
    rule = ExactMatch(extract="after_marker")
    answer = rule.answer(response)
    assert answer is not None and rule.equal(answer, reference) and not rule.equal(answer, reference + "1")


def test_a_per_cent_matches_its_number_and_its_fraction() -> None:
    assert readings("50%") == ({Fraction(50), Fraction(1, 2)}, True)
    assert readings("50") == ({Fraction(50)}, False)


@pytest.mark.skipif(not GSM8K.is_file(), reason="needs ../shared/data/gsm8k_train_1000.jsonl")
def test_every_worked_answer_of_gsm8k_matches_its_reference() -> None:
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    rules = [ExactMatch(), ExactMatch(extract="after_marker")]
    for row in rows:
        reference = row["answer"].rpartition("####")[2].strip()
        for rule in rules:
            answer = rule.answer(row["answer"])
            assert answer is not None and rule.equal(answer, reference), row["answer"]
    assert len(rows) == 1000


def test_answers_compare_equally_in_other_threads() -> None:
    """Signals, with which math-verify limits its time, reach the main thread alone."""
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(same(r"\sqrt{36}", "6")))
    thread.start()
    thread.join()
    assert found == [True]


def test_an_endless_comparison_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    import math_verify

    from rlhf.reward import answers

    monkeypatch.setattr(answers, "SECONDS", 0.05)
    monkeypatch.setattr(math_verify, "verify", lambda *_, **__: [None for _ in itertools.count()])
    assert not same(r"\sqrt{49}", "x+7")


def test_a_busy_machine_does_not_change_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is on CPU time: time spent waiting for other processes does not count."""
    import math_verify

    from rlhf.reward import answers

    monkeypatch.setattr(answers, "SECONDS", 0.05)
    monkeypatch.setattr(math_verify, "parse", lambda text, *_, **__: [text])
    monkeypatch.setattr(math_verify, "verify", lambda *_, **__: time.sleep(0.2) is None)
    assert same(r"\sqrt{50}", "x+8")
