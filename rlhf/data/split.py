"""Split of a data source into training and held-out records."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

from rlhf.data.control_tokens import Tokenizer
from rlhf.data.load_report import LoadReport
from rlhf.data.record_encoder import EncodeReport, RecordEncoder
from rlhf.data.records import Demonstration, Prompt, Text
from rlhf.errors import UserError, key, renaming
from rlhf.runs.data_source import DataSource


@dataclass(frozen=True)
class Split:
    """Training and held-out records, with the report of loading them and the options that they were loaded with.

    ``group`` is the config group of the data, which errors name; `load_split` sets it.
    """

    train: Sequence[Any]
    validation: Sequence[Any]
    report: LoadReport
    data: RecordEncoder
    group: str = "data"

    def naming_group(self) -> AbstractContextManager[None]:
        """Return a context manager: errors about ``data`` that are raised inside name the group of this data."""
        return renaming("data", self.group)

    def texts(self) -> Iterator[str]:
        """Yield all texts of the training records, on which a tokenizer is trained."""
        for record in self.train:
            if isinstance(record, Text):
                yield record.text
            elif isinstance(record, Demonstration):
                yield from (message.content for message in record.messages)
            else:
                turns = record.messages if isinstance(record, Prompt) else record.prompt
                yield from (message.content for message in turns)

    def encode(self, tokenizer: Tokenizer, part: Literal["train", "validation"]) -> tuple[Sequence[Any], EncodeReport]:
        """Encode one side of the split, as ``RecordEncoder.encode``.

        Raises:
            UserError: If nothing is left to train on, or as ``RecordEncoder.encode``.
        """
        with self.naming_group():
            rows, report = self.data.encode(tokenizer, self.train if part == "train" else self.validation)
            if part == "train" and not rows:
                raise UserError(
                    f"no row of {self.data.source} is left to train on ({report})",
                    fix=f"type a larger {key('data.max_length')}",
                    option="data.max_length",
                    value=self.data.max_length,
                )
        return rows, report

    def fit_prompts(self, tokenizer: Tokenizer) -> tuple["Split", EncodeReport, EncodeReport]:
        """Return the split with prompts within the length limits, and the reports of both sides.

        Raises:
            UserError: If no training prompt is left, or as ``RecordEncoder.fit_prompts``.
        """
        with self.naming_group():
            train, training = self.data.fit_prompts(tokenizer, self.train)
            validation, held_out = self.data.fit_prompts(tokenizer, self.validation)
            if not train:
                tighter = self.data.prompt_limit < self.data.max_length
                option, value = (
                    ("data.max_prompt_length", self.data.max_prompt_length)
                    if tighter
                    else ("data.max_length", self.data.max_length)
                )
                raise UserError(
                    f"no prompt of {self.data.source} fits ({training})",
                    fix=f"type a larger {key(option)}",
                    option=option,
                    value=value,
                )
        return replace(self, train=train, validation=validation), training, held_out


def load_split(source: DataSource, group: str) -> Any:
    """Load the data of a config group; errors now, and later when a stage encodes a `Split`, name the group."""
    with renaming("data", group):
        loaded = source.load()
    return replace(loaded, group=group) if isinstance(loaded, Split) else loaded
