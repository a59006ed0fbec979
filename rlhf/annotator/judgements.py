"""Judgement data: demonstrations that train a language model to judge."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlhf.annotator.judge import OPTIONS
from rlhf.annotator.judge_text import fill, read_template
from rlhf.data.data import Data
from rlhf.data.records import Comparison, Demonstration, Message
from rlhf.data.split import Split
from rlhf.errors import UserError, key, renaming


class Judgements(Data):
    """Comparisons converted to demonstrations of judging: each pair in both orders, with the answer A or B.

    A model fine-tuned on these (``stage=sft data=judgements``) is a judge for the same template.

    Args:
        comparisons: Data that provide the preferences.
        template: Question template, as for the judge.
    """

    def __init__(self, comparisons: Data, template: str = "short") -> None:
        super().__init__(
            record="demonstration",
            source=comparisons.source,
            size=None,
            validation=0,
            max_length=comparisons.max_length,
            seed=comparisons.seed,
        )
        self.comparisons, self.name, self.template = comparisons, template, self.check_hyperparameters(template)

    @staticmethod
    def check_hyperparameters(template: str = "short", **_: Any) -> str:  # type: ignore[override]
        """Return the template's text; the comparisons are validated as their own config node.

        Raises:
            UserError: As ``read_template``.
        """
        return read_template(template, "data.template")

    def digest(self) -> str:
        """Return the sha256 of the comparisons' digest and the template."""
        with renaming("data", "data.comparisons"):
            return hashlib.sha256(f"{self.comparisons.digest()}/{self.template}".encode()).hexdigest()

    def load(self) -> Split:
        """Load two demonstrations per pair of the comparisons; held-out comparisons stay held out."""
        with renaming("data", "data.comparisons"):
            split = self.comparisons.load()
        train, validation = self._questions(split.train), self._questions(split.validation)
        report = replace(split.report, source=self.source, train=len(train), validation=len(validation))
        return Split(train, validation, report, self)

    def _questions(self, comparisons: Sequence[Any]) -> list[Demonstration]:
        made = []
        for comparison in comparisons:
            if not isinstance(comparison, Comparison):
                raise UserError(
                    f"must be data of comparisons, has {comparison.name}s",
                    fix=f"type {key('data@data.comparisons', 'comparisons')}",
                    option="data.comparisons",
                )
            for better, worse, _ in comparison.pairs():
                one, two = comparison.responses[better], comparison.responses[worse]
                for first, second, answer in ((one, two, OPTIONS[0]), (two, one, OPTIONS[1])):
                    question = fill(self.template, comparison.prompt, first, second)
                    made.append(Demonstration((Message("user", question), Message("assistant", answer))))
        return made
