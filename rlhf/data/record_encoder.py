"""Encoding of whole data sets to tokens within length limits, with a report of what was truncated and dropped."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from rlhf.data.control_tokens import Tokenizer
from rlhf.data.disk import DiskList
from rlhf.data.encoded_rows import Encoded
from rlhf.data.encoding import (
    dialogue_pieces,
    encode_comparison,
    encode_label,
    encode_pieces,
    encode_texts,
    fit_messages,
    fit_prompt,
)
from rlhf.data.records import Comparison, Demonstration, Label, Prompt, Record, RecordName, Text, count_truncated
from rlhf.data.rendering import DialogueRejected
from rlhf.data.sources import source_error
from rlhf.data.template_check import check_template
from rlhf.errors import RLHFError, UserError, key

T = TypeVar("T")


@dataclass
class EncodeReport:
    """Counts of the records that were encoded, truncated and dropped."""

    kept: int = 0
    truncated: int = 0  # rows cut at max_length, or prompts that lost their oldest turns
    dropped: int = 0  # records that do not fit
    tokens: int = 0
    missing_eos: int = 0  # responses truncated in sampling, whose last token is not end-of-turn
    refused: int = 0  # records that cannot be encoded, for example by the chat template
    first_place: str = ""  # file and row of the first of them, or its source
    first_error: Exception | None = None  # reason for the first of them
    lengths: list[int] = field(default_factory=list)  # tokens of each kept prompt, from ``fit_prompts`` only

    @property
    def first_refused(self) -> str:
        """Place of the first record that cannot be encoded, and the reason; "" if there is none."""
        return "" if self.first_error is None else f"{self.first_place}: {self.first_error}"

    def __str__(self) -> str:
        line = f"{self.kept} rows, {self.tokens} tokens, {self.truncated} truncated, {self.dropped} dropped as too long"
        if self.missing_eos:
            line += f", {self.missing_eos} responses were cut off and have no end-of-turn"
        return line + (f", {self.refused} dropped: {self.first_refused}" if self.refused else "")


class RecordEncoder(ABC):
    """Encoder of the records of one source.

    Args:
        record: Record type.
        source: Name of the source, for messages.
        max_length: Most tokens per row.
        max_prompt_length: Most tokens per prompt (None: only max_length applies).
        max_bad: Share of records that cannot be encoded above which encoding stops.
        streaming: Whether encoded rows are kept on disk.
    """

    def __init__(
        self,
        record: RecordName,
        source: str,
        max_length: int,
        max_prompt_length: int | None,
        max_bad: float,
        streaming: bool,
    ) -> None:
        self.record, self.source = record, source
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        self.max_bad, self.streaming = max_bad, streaming

    @abstractmethod
    def place(self, record: Record) -> str:
        """Return where a record comes from, such as "file, row 3"; "" if unknown."""

    def encode(self, tokenizer: Tokenizer, records: Sequence[Record]) -> tuple[Sequence[Any], EncodeReport]:
        """Encode records to tokens, within max_length and max_prompt_length.

        Documents longer than max_length are cut into several rows, which count as truncated.

        Returns:
            The rows (Encoded for texts and demonstrations, EncodedComparison, EncodedLabel, or list[int] for prompts),
            and the report.

        Raises:
            UserError: For a chat template that cannot be used for training, or if more than max_bad of the records
                cannot be encoded.
        """
        report = EncodeReport()
        found = self.iter_encoded(tokenizer, records, report)
        rows = DiskList(found) if self.streaming else list(found)
        self._check_refused(report, len(records))
        return rows, report

    def _refuse(self, report: EncodeReport, record: Record, reason: Exception) -> None:
        """Count a record that cannot be encoded, and store the reason of the first."""
        report.refused += 1
        if report.first_error is None:
            # Without the traceback, which would keep the frames of the encoder alive.
            report.first_place, report.first_error = self.place(record) or self.source, reason.with_traceback(None)

    def _check_refused(self, report: EncodeReport, count: int) -> None:
        if report.refused > self.max_bad * count:
            reason, fix = _as_text(report.first_error)
            raise source_error(
                self.source,
                f"{report.refused} of {count} records cannot be encoded; first: {report.first_place}: {reason}",
                fix=f"{fix}raise {key('data.max_bad')} ({self.max_bad} allows {int(self.max_bad * count)} records)",
            )

    def iter_encoded(self, tokenizer: Tokenizer, records: Sequence[Record], report: EncodeReport) -> Iterator[Any]:
        """Yield the rows of ``encode``, however many records are rejected; `report` is updated."""
        if self.record == "text":
            for texts in iter_text_batches(record.text for record in records if isinstance(record, Text)):
                for row in encode_texts(tokenizer, texts):
                    pieces = row.windows(self.max_length)
                    report.kept += len(pieces)
                    report.truncated += len(pieces) > 1
                    report.tokens += sum(map(len, pieces))
                    yield from pieces
            return
        # Rejection sampling encodes demonstrations with the limits of its prompts.
        found = self._demonstrations if records and isinstance(records[0], Demonstration) else self._one_by_one
        for record, row, cut in found(tokenizer, records, report):
            if row is None:
                report.dropped += 1
                continue
            report.kept += 1
            report.truncated += cut
            report.tokens += len(row)
            report.missing_eos += count_truncated(record)
            yield row

    def _one_by_one(
        self, tokenizer: Tokenizer, records: Iterable[Any], report: EncodeReport
    ) -> Iterator[tuple[Record, Any, bool]]:
        """Yield each record that can be encoded, its row (None if it does not fit) and whether that was truncated."""
        for record in records:
            turns = record.messages if isinstance(record, Prompt) else record.prompt
            check_template(tokenizer, turns)  # raises for a template that no record can use
            row: Any
            try:
                if isinstance(record, Comparison):
                    row, cut = encode_comparison(tokenizer, record, self.max_length, self.max_prompt_length)
                elif isinstance(record, Label):
                    row, cut = encode_label(tokenizer, record, self.max_length, self.max_prompt_length)
                else:
                    row, cut = fit_prompt(tokenizer, record.messages, self.prompt_limit)
            except (UserError, ValueError) as error:
                self._refuse(report, record, error)
                continue
            yield record, row, cut

    def _demonstrations(
        self, tokenizer: Tokenizer, records: Iterable[Any], report: EncodeReport
    ) -> Iterator[tuple[Record, Any, bool]]:
        """Yield demonstrations as ``_one_by_one`` does other records; many are tokenized at once."""
        for batch in _batches(records, lambda record: sum(len(message.content) for message in record.messages)):
            rendered: list[tuple[Demonstration, list[str]]] = []
            for record in batch:
                check_template(tokenizer, record.messages)
                try:
                    rendered.append((record, dialogue_pieces(tokenizer, record.messages, record.ended)))
                except (UserError, ValueError) as error:
                    self._refuse(report, record, error)
            rows = encode_pieces(tokenizer, [pieces for _, pieces in rendered])
            for (record, _), whole in zip(rendered, rows, strict=True):
                row = Encoded(whole.ids[: self.max_length], whole.mask[: self.max_length])
                yield record, row if any(row.mask) else None, len(whole) > self.max_length

    @property
    def prompt_limit(self) -> int:
        """Most tokens of a record that is a prompt alone."""
        return self.max_length if self.max_prompt_length is None else min(self.max_length, self.max_prompt_length)

    def fit_prompts(self, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> tuple[list[Prompt], EncodeReport]:
        """Return prompts within max_length and max_prompt_length, and a report.

        Longer prompts lose their oldest turns; those that still do not fit are dropped.

        Raises:
            UserError: If the chat template cannot render more than max_bad of the prompts.
        """
        report = EncodeReport()
        kept = []
        for prompt in prompts:
            try:
                turns, ids = fit_messages(tokenizer, prompt.messages, self.prompt_limit)
            except (DialogueRejected, ValueError) as error:
                self._refuse(report, prompt, error)
                continue
            if turns is None:
                report.dropped += 1
                continue
            report.kept += 1
            report.truncated += len(turns) < len(prompt.messages)
            report.tokens += len(ids)
            report.lengths.append(len(ids))
            kept.append(prompt if len(turns) == len(prompt.messages) else replace(prompt, messages=tuple(turns)))
        self._check_refused(report, len(prompts))
        return kept, report


def _as_text(error: Exception | None) -> tuple[str, str]:
    """Return the problem and the fix of an error, whose marked keys the error that contains them can rename."""
    if not isinstance(error, RLHFError):
        return str(error), "fix the file, or "
    problem = f"{key(error.option)}: {error.problem}" if error.option else error.problem
    return problem, f"{error.fix}, or " if error.fix else ""


def iter_text_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield batches of texts that are cheap to tokenize at once, and small however long the texts are."""
    return _batches(texts, len)


def _batches(items: Iterable[T], characters: Callable[[T], int]) -> Iterator[list[T]]:
    """Yield at most 256 items at a time, fewer if they have more than a million characters."""
    batch: list[T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += characters(item)
        if len(batch) == 256 or size > 1 << 20:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
