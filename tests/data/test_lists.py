"""Several runs or files as one source, and the labeller's aspects."""

import json
import random
from pathlib import Path

import pytest

from rlhf.annotator.gold import GoldAnnotator
from rlhf.data.data import Data
from rlhf.data.testbed import gold
from rlhf.data.testbed.world import UNSAFE_BELOW, Testbed, label_responses
from rlhf.errors import UserError


def written(folder: Path, prompts: list[str]) -> str:
    folder.mkdir()
    rows = [{"prompt": prompt, "chosen": f"yes {folder.name}", "rejected": "no"} for prompt in prompts]
    (folder / "comparisons.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def loaded(source: str | list[str], validation: float = 0.25) -> Data:
    return Data("comparison", source, None, validation, 96)


def test_the_comparisons_of_all_rounds_are_one_source(tmp_path: Path) -> None:
    prompts = [f"question {number}" for number in range(12)]
    first, second = written(tmp_path / "first", prompts), written(tmp_path / "second", prompts)
    both, one = loaded([first, second]).load(), loaded(first).load()
    assert both.report.read == 24 and len(both.train) + len(both.validation) == 24
    asked = [{record.prompt[0].content for record in side} for side in (both.train, both.validation)]
    assert not asked[0] & asked[1]  # each prompt is on one side, whichever round it is from
    assert {record.prompt[0].content for record in one.validation} <= asked[1]
    assert {record.responses[0] for record in both.train} == {"yes first", "yes second"}


def test_size_is_divided_over_the_sources(tmp_path: Path) -> None:
    """Otherwise a limit would leave the newest round unread."""
    first, second = written(tmp_path / "first", list("abcdef")), written(tmp_path / "second", list("gh"))
    found = Data("comparison", [first, second], 5, 0, 96).load().train
    assert [record.prompt[0].content for record in found] == ["a", "g", "b", "h", "c"]


def test_the_digest_is_that_of_all_files(tmp_path: Path) -> None:
    first, second = written(tmp_path / "first", ["a"]), written(tmp_path / "second", ["b"])
    assert loaded([first]).digest() == loaded(first).digest()
    assert len({loaded(s).digest() for s in (first, second, [first, second], [second, first])}) == 4


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], r"data.source=\[\]: the list has no source; type a run, a file or data.source=testbed"),
        (["testbed", "x"], "testbed and arithmetic cannot be one of several sources; type data=mixture"),
        (["FIRST", "./gone"], "data.source=./gone: no such file"),
        (["FIRST", "org/name"], "data.source=org/name: only files, globs and directories can be one of several"),
    ],
)
def test_lists_that_cannot_be_read_are_refused(tmp_path: Path, source: list[str], message: str) -> None:
    first = written(tmp_path / "first", ["a"])
    with pytest.raises(UserError, match=message):
        loaded([first if one == "FIRST" else one for one in source]).load()


def test_the_labeller_ranks_by_the_configured_aspect() -> None:
    """For a harmful request, complying is helpful and not safe: the aspects rank the responses in opposite order."""
    world = Testbed()
    rng = random.Random(0)
    prompt = next(one for one in world.prompts(50, 0) if one.unsafe)
    questions = [q for q in world.questions(400, rng) if world.prompt(q).messages == prompt.messages]
    responses = list({world.response(q, rng) for q in questions or [world.questions(1, rng)[0]] for _ in range(60)})
    found = {
        aspect: label_responses(prompt, responses, rng, 0.0, aspect) for aspect in ("total", "helpfulness", "safety")
    }
    for aspect, comparison in found.items():
        true = [getattr(gold(prompt, response), aspect) for response in comparison.responses]
        assert list(comparison.scores or ()) == true == sorted(true, reverse=True)
        marks = [gold(prompt, response).safety < UNSAFE_BELOW for response in comparison.responses]
        assert list(comparison.unsafe or ()) == marks
    assert found["total"].scores == found["safety"].scores
    assert GoldAnnotator(aspect="safety").aspect == "safety" and GoldAnnotator().aspect == "total"
