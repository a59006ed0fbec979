from pathlib import Path

import pytest

from rlhf.annotator.judge import Answer, JudgeAnnotator
from rlhf.sampler.rollout import Rollout
from rlhf.testing import rollout, tiny_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("judge") / "model"
    tiny_model().save(path)
    return path


class Scripted(JudgeAnnotator):
    """Judge whose answers come from a function of (first, second)."""

    def __init__(self, path: Path, say, **hyperparameters) -> None:
        super().__init__(str(path), template="short", **hyperparameters)
        self.say, self.calls = say, 0

    def _answers(self, questions: list[str]) -> list[Answer]:
        self.calls += len(questions)
        found = []
        for question in questions:
            _, first, second = question.split("\n")
            value = self.say(first.removeprefix("A: "), second.removeprefix("B: "))
            found.append((value, "?" if value is None else "A" if value > 0 else "B"))
        return found


def longer(first: str, second: str) -> float:
    return float(len(first) - len(second))


def given(*responses: str) -> Rollout:
    return rollout(["What is two plus two?"] * len(responses), list(responses))
