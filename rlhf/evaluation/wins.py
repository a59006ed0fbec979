"""Pairwise comparison of responses to the same prompt: 1 if ours is better, 0 if theirs is, 1/2 for a tie."""

from collections.abc import Sequence
from pathlib import Path

from rlhf.annotator.judge import JudgeAnnotator
from rlhf.annotator.judge_text import fill
from rlhf.callbacks.progress import Meter
from rlhf.data.records import Prompt
from rlhf.errors import UserError, key, moved
from rlhf.evaluation.measuring import device


def by_scores(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return the verdict of each prompt: the response with the higher score wins."""
    return [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True)]


class Judge:
    """Language model that compares both responses in both orders; one wins only if it is preferred in both.

    Args:
        path: Model directory, GGUF file or hub id.
        template: Name of a template of `rlhf.annotator.judge`, or a text file with {prompt}, {first} and {second}.
        cache: Directory in which answers are cached, so that no question is repeated.
        batch_size: Questions per batch.
    """

    def __init__(self, path: str, template: str, cache: Path, batch_size: int) -> None:
        try:
            self._judge = JudgeAnnotator(path, template, batch_size=batch_size)
        except UserError as error:
            _name_options(error, path)
            raise
        self._judge.to(device())
        self._judge.open(cache)
        self.asked = self.same_place = 0

    def __call__(self, prompts: Sequence[Prompt], ours: Sequence[str], theirs: Sequence[str]) -> list[float]:
        """Return one verdict per prompt.

        Equal responses tie without a question; an unreadable answer counts as no preference.
        """
        different = [i for i in range(len(prompts)) if ours[i] != theirs[i]]
        questions = []
        for i in different:
            turns = prompts[i].messages
            questions.append(fill(self._judge.template, turns, ours[i], theirs[i]))
            questions.append(fill(self._judge.template, turns, theirs[i], ours[i]))
        try:
            with Meter("judge", len(questions), "question") as meter:
                answers = iter(self._judge.ask(questions, meter.advance))
        except UserError as error:
            _name_options(error, self._judge.path)
            raise
        verdicts = [0.5] * len(prompts)
        for i in different:
            first, second = next(answers)[0] or 0.0, next(answers)[0] or 0.0
            self.asked += 1
            self.same_place += first * second > 0
            if first > 0 > second:
                verdicts[i] = 1.0
            elif first < 0 < second:
                verdicts[i] = 0.0
        return verdicts


def _name_options(error: UserError, path: str) -> None:
    """Rename the judge's config keys in an error to the options of the command."""
    for finding in error.findings:
        if "model.chat_template" in finding.fix_keys:
            finding.fix = f"type another {key('annotator.path')}"
        if finding.option == "model.chat_template":
            finding.option, finding.value = "annotator.path", path
    for name, option in (
        ("annotator.path", "--judge"),
        ("model.path", "--judge"),
        ("annotator.template", "--judge-template"),
    ):
        error.rename(moved(name, option))
