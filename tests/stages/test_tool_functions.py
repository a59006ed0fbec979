"""Tools that a policy calls: calculator and search, by themselves."""

import pytest

from rlhf.data.testbed.world import Testbed
from rlhf.sampler.tool_calls import Calculator, Search


@pytest.mark.parametrize(
    "expression, value",
    [
        ("3+4", "7"),
        (" 3 - 10 ", "-7"),
        ("(3+4)*2", "14"),
        ("7/2", "3.5"),
        ("1/3", "0.333333"),
        ("0.1+0.2", "0.3"),
        ("7//2", "3"),
        ("-7 % 3", "2"),
        ("1,000 + 1", "1001"),
        ("6 × 7", "42"),
        ("--3", "3"),
        ("9999999999*9999999999", "99999999980000000001"),
    ],
)
def test_the_calculator_evaluates_arithmetic(expression, value):
    assert Calculator()(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "().__class__",
        "9**9**9",
        "1 if 1 else 2",
        "[1][0]",
        "abs(3)",
        "x+1",
        "'a'*9",
        "True+1",
        "1j",
        "lambda: 1",
        "1e999",
        "3+",
        "",
        "007",
        "3 == 3",
        "1" * 81,
        "(" * 79,
        "\x00",
        "1<<9",
    ],
)
def test_the_calculator_executes_nothing(expression):
    with pytest.raises(ValueError, match="not arithmetic|too long"):
        Calculator()(expression)
    with pytest.raises(ValueError, match="division by zero"):
        Calculator()("1/0")


def test_search_finds_the_facts_of_the_world():
    world = Testbed(seed=3)
    search = Search(world)
    for (person, topic), value in world.facts.items():
        for query in (f"{person} {topic}", f"what is the {topic} of {person}?", f"{topic.upper()} {person}"):
            assert person in search(query) and value in search(query), query
    assert search("zebra") == search("") == "nothing found"
    assert search("Mia").count(".") == 1 and Search(world, results=4)("Mia").count(".") == 4
    assert len({Search(Testbed(seed=seed))("Mia home") for seed in range(6)}) > 1
