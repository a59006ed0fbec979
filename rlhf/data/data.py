"""Data of a stage: the class that every option of the config group `data` builds. Needs no torch."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from rlhf.data.disk import DiskList, View
from rlhf.data.format_detection import detect, find_adapter
from rlhf.data.held_out import HELD_OUT, HELD_OUT_SHARE, select_held_out
from rlhf.data.load_report import BadRow, LoadReport
from rlhf.data.record_conversion import convert
from rlhf.data.record_encoder import RecordEncoder
from rlhf.data.records import Comparison, Demonstration, Prompt, Record, RecordName, Text
from rlhf.data.sources import (
    ARITHMETIC,
    TESTBED,
    Row,
    check_numbers,
    digest_files,
    find_files,
    read_files,
    read_hub,
    source_error,
)
from rlhf.data.split import Split
from rlhf.data.testbed.arithmetic import Arithmetic
from rlhf.data.testbed.world import Testbed
from rlhf.errors import UserError, key
from rlhf.runs.data_source import DataSource

# Training records of the testbed for data.size=null.
TESTBED_SIZES: dict[str, int] = {
    "text": 8000,
    "demonstration": 3000,
    "comparison": 3000,
    "label": 3000,
    "prompt": 1500,
}

MOST_MADE_UP = 10_000_000  # limit of testbed records, which are kept in memory

SMALL_FILES = 4 << 20  # bytes of local files that are read before a run, to validate them

_CHECKED_EARLY = ContextVar("checked_early", default=True)


@contextmanager
def skip_file_checks() -> Iterator[None]:
    """Context manager: check configs without reading their data files.

    ``Data.load`` reports what is wrong with the files later.
    """
    token = _CHECKED_EARLY.set(False)
    try:
        yield
    finally:
        _CHECKED_EARLY.reset(token)


class Data(RecordEncoder, DataSource):
    """Records of one type from one source.

    Args:
        record: Record type that the stage needs; rows of other types are converted if they contain what it needs.
        source: A file, a glob, a directory (of a run), a Hugging Face id (ID or ID:SUBSET), testbed, or arithmetic. A
            list of files, globs and directories is read as one source (for example the comparisons of all rounds): one
            after the other, or alternating row by row where size limits the number of records.
        size: For the testbed the number of training records (null: its default); otherwise the most records that are
            read, held-out ones included (null: all).
        validation: Held-out records, as a number (from 1) or a share (below 1). They are selected by the hash of the
            prompt, not by order: another order moves no record between the sides, more data moves few, and records with
            the same prompt stay on one side. The number is therefore met as closely as whole prompts allow, and the
            report says so where it is not met. null: 400 prompts of the testbed, a tenth of anything else. Stages that
            read one file should hold out the same share, so that none is measured on prompts that another was trained
            on.
        max_length: Most tokens per row. Texts are cut into rows and demonstrations are truncated on the right;
            comparisons and labels lose the oldest turns of their prompt, and are dropped if that is not enough.
        max_prompt_length: Most tokens per prompt, enforced as above (null: only max_length applies).
        format: Name of a format, `auto` to detect it from the fields, or package.module:function (raw dict -> record).
        split: Split of a Hugging Face data set.
        seed: Seed of the testbed's draws, and of the selection of held-out records.
        max_bad: Share of unusable rows above which loading stops.
        tags: Tags added to every prompt, for example [unsafe].
        testbed: The world, for source=testbed.
        arithmetic: The problems, for source=arithmetic.
        streaming: Read row by row and keep records and their tokens on disk (in RLHF_CACHE) instead of in memory; for
            texts and demonstrations. Everything else, the order of batches and a resume included, is the same.
    """

    def __init__(
        self,
        record: RecordName,
        source: str | list[str],
        size: Annotated[int, Field(gt=0)] | None,
        validation: Annotated[float, Field(ge=0)] | None,
        max_length: Annotated[int, Field(gt=1)],
        max_prompt_length: Annotated[int, Field(gt=0)] | None = None,
        format: str = "auto",
        split: str = "train",
        seed: int = 0,
        max_bad: Annotated[float, Field(ge=0, le=1)] = 0.05,
        tags: list[str] | None = None,
        testbed: Testbed | None = None,
        arithmetic: Arithmetic | None = None,
        streaming: bool = False,
    ) -> None:
        # A list of one source is equivalent to that source.
        self.sources = [source] if isinstance(source, str) else [str(one) for one in source]
        super().__init__(record, ", ".join(self.sources), max_length, max_prompt_length, max_bad, streaming)
        if validation is None:
            made_up = self.source in (TESTBED, ARITHMETIC)
            validation = HELD_OUT if made_up and record == "prompt" else HELD_OUT_SHARE
        self.size, self.validation, self.format = size, validation, format
        self.split, self.seed, self.tags = split, seed, tuple(tags or ())
        self.places: dict[int, str] | None = None  # id of a record in memory -> "file, row 3"; filled if not None
        self.testbed = testbed or Testbed()
        self.arithmetic = arithmetic or Arithmetic()
        if not self.sources:
            raise source_error(
                "[]",
                "the list has no source",
                fix=f"type a run, a file or {key('data.source', TESTBED)}",
            )
        if len(self.sources) > 1 and {TESTBED, ARITHMETIC} & set(self.sources):
            raise source_error(
                f"[{self.source}]",
                f"{TESTBED} and {ARITHMETIC} cannot be one of several sources",
                fix=f"type {key('data', 'mixture')}",
            )
        if streaming and record not in ("text", "demonstration"):
            raise UserError(
                f"{record}s are kept in memory, only texts and demonstrations can be streamed",
                fix=f"type {key('data.streaming', 'false')}",
                option="data.streaming",
                value="true",
            )
        if validation >= 1 and validation != int(validation):
            raise UserError(
                "must be a whole number of records, or a share below 1",
                fix=f"type {key('data.validation', int(validation))}",
                option="data.validation",
                value=validation,
            )

    @staticmethod
    def check_hyperparameters(**hyperparameters: Any) -> None:
        """Read small local files before anything runs, so that a malformed file fails now and not hours later.

        Larger files, runs, and data sets of the hub are read when their step begins.

        Raises:
            UserError: As ``load``, and for an unknown format or a testbed size above the limit.
        """
        size = hyperparameters.get("size")
        if hyperparameters.get("source") in (TESTBED, ARITHMETIC) and type(size) is int and size > MOST_MADE_UP:
            raise UserError(
                f"must be at most {MOST_MADE_UP}, because generated records are kept in memory",
                fix=f"type {key('data.size', MOST_MADE_UP)} or less",
                option="data.size",
                value=size,
            )
        if isinstance(hyperparameters.get("format"), str):
            find_adapter(hyperparameters["format"])  # an unknown name is an error whatever the source is
        if not _CHECKED_EARLY.get():
            return
        source = hyperparameters.get("source") or []
        files = [Path(str(one)) for one in ([source] if isinstance(source, str) else source)]
        if (
            files
            and all(file.is_file() for file in files)
            and sum(file.stat().st_size for file in files) <= SMALL_FILES
        ):
            own = {name: value for name, value in hyperparameters.items() if name not in ("testbed", "arithmetic")}
            Data(**{"size": None, "validation": 0, "max_length": 2} | own).load()

    def digest(self) -> str:
        """Return the sha256 of the source: file contents, the testbed's hyperparameters, or a data set's name."""
        if self.source == TESTBED:
            return hashlib.sha256(json.dumps(self.testbed.hyperparameters(), sort_keys=True).encode()).hexdigest()
        if self.source == ARITHMETIC:
            return hashlib.sha256(json.dumps(self.arithmetic.hyperparameters(), sort_keys=True).encode()).hexdigest()
        files = self._files()
        if files:
            return digest_files(files)
        return hashlib.sha256(f"{self.source}/{self.split}".encode()).hexdigest()

    def load(self) -> Split:
        """Load all records and split them.

        Raises:
            UserError: If too many rows are unusable (the message names file, row and field), or if none is left to
                train on.
        """
        report = LoadReport(source=self.source)
        if self.source in (TESTBED, ARITHMETIC):
            train, validation = self._from_testbed(report)
        else:
            found = (record for _, record in self._records_with_rows(report))
            train, validation = self._split(DiskList(found) if self.streaming else list(found), report)
        report.train, report.validation = len(train), len(validation)
        if not train:
            raise source_error(
                self.source,
                f"no usable {self.record}s ({report})",
                fix=f"type another source: {key('data.source', 'FILE')}",
            )
        return Split(train, validation, report, self)

    def place(self, record: Record) -> str:
        """Return "file, row 3" of the first row that gives this record, by rereading the files; "" if unknown."""
        if self.source in (TESTBED, ARITHMETIC) or not self._files():
            return ""
        found = self._records_with_rows(LoadReport(source=self.source))
        return next((row.place for row, other in found if other == record), "")

    def _from_testbed(self, report: LoadReport) -> tuple[Sequence[Any], Sequence[Any]]:
        size = self.size or TESTBED_SIZES[self.record]
        held_out = self._held_out(size)
        world = self.testbed if self.source == TESTBED else self.arithmetic
        if self.record == "text":
            train, validation = self._split(list(world.texts(size + held_out, self.seed)), report, held_out)
        else:
            draw: Callable[..., Sequence[Record]] | None = getattr(world, f"{self.record}s", None)
            if draw is None:
                raise source_error(
                    self.source,
                    f"has no {self.record}s, only texts, demonstrations and prompts",
                    fix=f"type another {key('data.source')}",
                )
            train, validation = list(draw(size, self.seed)), list(draw(held_out, self.seed, held_out=True))
        report.read = report.kept = len(train) + len(validation)
        return train, validation

    def _held_out(self, n: int) -> int:
        """Return how many of n records to hold out; a share above 0 is at least one record."""
        if self.validation >= 1 or self.validation == 0:
            return int(self.validation)
        return max(1, round(self.validation * n))

    def _files(self) -> list[Path]:
        """Return the local files of the sources; empty if the source is a data set of the hub."""
        found = [find_files(source, self.record) for source in self.sources]
        for source, files in zip(self.sources, found, strict=True):
            if len(self.sources) > 1 and not files:
                raise source_error(
                    source,
                    "only files, globs and directories can be one of several sources",
                    fix=f"type {key('data', 'mixture')}",
                )
        return [file for files in found for file in files]

    def _rows(self) -> Iterator[Row]:
        files = self._files()
        if len(self.sources) > 1 and self.size is not None:
            # Alternate, otherwise the first sources would fill the size and the newest round would not be read.
            readers = [read_files(find_files(source, self.record)) for source in self.sources]
            rounds = zip_longest(*readers)
            return (row for rows in rounds for row in rows if row is not None)
        if files:
            return read_files(files)
        return read_hub(self.source, self.split, lazily=self.streaming or self.size is not None)

    def _records_with_rows(self, report: LoadReport) -> Iterator[tuple[Row, Record]]:
        """Yield every record with its row."""
        adapter = find_adapter(self.format)
        for row in self._rows():
            if self.size is not None and report.kept >= self.size:
                break
            report.read += 1
            try:
                if row.error:
                    raise ValueError(row.error)
                raw = {"text": row.raw} if isinstance(row.raw, str) else row.raw
                if not isinstance(raw, dict):
                    raise ValueError(f"expected an object with fields, got {type(raw).__name__}")
                check_numbers(raw)
                found = convert((adapter or find_adapter(detect(raw)))(raw), self.record)  # type: ignore[misc]
                found = [self._tagged(record) for record in found]
                for record in found:
                    _check_turns(record)
                if any(isinstance(record, Comparison) and not record.pairs() for record in found):
                    report.ties += 1
                    continue
                if not found:  # a tie gives no label, a bad response no demonstration
                    report.ties += self.record == "label"
                    report.unwanted += self.record != "label"
                    continue
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                reason = f"{error.args[0]}: missing" if isinstance(error, KeyError) else str(error)
                report.bad.append(BadRow(row.place, reason))
                continue
            if self.size is not None:
                found = found[: self.size - report.kept]  # a row can give several records
            report.kept += len(found)
            if self.places is not None:
                self.places |= {id(record): row.place for record in found}
            yield from ((row, record) for record in found)
        if len(report.bad) > self.max_bad * report.read:
            counts = Counter(row.reason for row in report.bad).most_common(3)
            raise source_error(
                self.source,
                f"{len(report.bad)} of {report.read} rows are unusable as {self.record}s; first: {report.bad[0]}; "
                f"most often: {'; '.join(f'{count} x {reason}' for reason, count in counts)}",
                fix=f"fix the file, type its format ({key('data.format', 'NAME')}), or raise {key('data.max_bad')} "
                f"({self.max_bad} allows {int(self.max_bad * report.read)} rows)",
            )

    def _tagged(self, record: Record) -> Record:
        if not self.tags:
            return record
        if isinstance(record, Prompt | Comparison):
            return replace(record, tags=(*record.tags, *self.tags))
        raise UserError(
            f"a {record.name} has no tags",
            fix=f"type {key('data.tags', None)}",
            option="data.tags",
            value=list(self.tags),
        )

    def _split(
        self, records: Sequence[Any], report: LoadReport, held_out: int | None = None
    ) -> tuple[Sequence[Any], Sequence[Any]]:
        """Split records into (train, validation) by the hash of the prompt; each side keeps the order of the source.

        Records with the same prompt stay on one side, so `held_out` is met as closely as whole prompts allow; where it
        is not met, the report gets a line.
        """
        if held_out is None:
            held_out = self._held_out(len(records))
        if held_out == 0 or not records:
            return records, []
        if held_out >= len(records) and self.validation >= 1:
            share = key("data.validation", HELD_OUT_SHARE if len(records) > 1 else 0)
            raise UserError(
                f"holds out all of the {len(records)} records and leaves none to train on",
                fix=f"type {share}, or a larger file",
                option="data.validation",
                value=held_out,
            )
        train, validation, report.split = select_held_out(records, held_out, self.seed)
        if self.streaming:
            return View(records, train), View(records, validation)
        return [records[place] for place in train], [records[place] for place in validation]


def _check_turns(record: Record) -> None:
    """Raise ValueError for a dialogue with an empty turn of the user or the assistant.

    A tool's result may be empty. A compared response may be empty too: that it is worse than another is a preference.
    """
    if isinstance(record, Text):
        return
    messages = record.messages if isinstance(record, Demonstration | Prompt) else record.prompt
    for number, message in enumerate(messages, 1):
        if message.role in ("user", "assistant") and not message.content.strip():
            raise ValueError(f"turn {number} ({message.role}): empty")
