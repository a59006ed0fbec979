"""Data: what every option of the group `data` builds. Needs no torch."""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from rlhf.data import template
from rlhf.data.disk import DiskList, View
from rlhf.data.formats import convert, detect, find_adapter
from rlhf.data.records import Comparison, Demonstration, Label, Prompt, Record, RecordName, Text
from rlhf.data.sources import ARITHMETIC, TESTBED, Row, check_numbers, digest_files, find_files, read_files, read_hub
from rlhf.data.testbed.arithmetic import Arithmetic
from rlhf.data.testbed.world import Testbed
from rlhf.errors import UserError

# Training records of the testbed where data.size is null.
TESTBED_SIZES: dict[str, int] = {
    "text": 8000,
    "demonstration": 3000,
    "comparison": 3000,
    "label": 3000,
    "prompt": 1500,
}

HELD_OUT = 400  # prompts of the testbed where data.validation is null: a standard error of 1/20 of the spread
HELD_OUT_SHARE = 0.1  # of anything else, as of demonstrations and comparisons: one file, one held-out part

SEARCHED = 1_000_000  # sums of groups that are looked at for the held-out part
MOST_MADE_UP = 10_000_000  # records of the testbed, which are kept in memory

SMALL_FILES = 4 << 20  # bytes of local files that are read before a run to see whether they can be


@dataclass
class LoadReport:
    """What became of the rows of a source."""

    source: str
    read: int = 0
    kept: int = 0
    ties: int = 0  # comparisons without a preference
    unwanted: int = 0  # replies marked bad, where replies to imitate are read
    bad: list[str] = field(default_factory=list)  # "file, row 3: field: reason", one for each bad row
    train: int = 0
    validation: int = 0
    split: str = ""  # why another number of records is held out than was asked for

    def __str__(self) -> str:
        """One line for the screen."""
        parts = [f"{self.source}: {self.read} read, {self.train} to train on, {self.validation} held out"]
        if self.ties:
            parts.append(f"{self.ties} dropped as ties (no preference, or the same text twice)")
        if self.unwanted:
            parts.append(f"{self.unwanted} left out as replies marked bad (label false)")
        if self.bad:
            parts.append(f"{len(self.bad)} dropped as unusable (first: {self.bad[0]})")
        if self.split:
            parts.append(self.split)
        return ", ".join(parts)


@dataclass
class EncodeReport:
    """What became of records on their way to tokens."""

    kept: int = 0
    truncated: int = 0  # rows cut at max_length, or prompts that lost their oldest turns
    dropped: int = 0  # do not fit
    tokens: int = 0
    missing_eos: int = 0  # responses cut off when they were sampled: their last token is no end-of-turn
    refused: int = 0  # dialogues that the chat template cannot write
    first_refused: str = ""  # why, for the first of them
    lengths: list[int] = field(default_factory=list)  # tokens of each prompt that is kept, where they stay prompts

    def __str__(self) -> str:
        line = f"{self.kept} rows, {self.tokens} tokens, {self.truncated} truncated, {self.dropped} dropped as too long"
        if self.missing_eos:
            line += f", {self.missing_eos} responses were cut off and have no end-of-turn"
        return line + (f", {self.refused} dropped: {self.first_refused}" if self.refused else "")


@dataclass(frozen=True)
class Split:
    """Records to train on and held-out ones, the report of loading them, and the options they were loaded with."""

    train: Sequence[Any]
    validation: Sequence[Any]
    report: LoadReport
    data: "Data"

    def texts(self) -> Iterator[str]:
        """Everything that is written in the training records: what a tokenizer is trained on."""
        for record in self.train:
            if isinstance(record, Text):
                yield record.text
            elif isinstance(record, Demonstration):
                yield from (message.content for message in record.messages)
            else:
                turns = record.messages if isinstance(record, Prompt) else record.prompt
                yield from (message.content for message in turns)

    def encode(
        self, tokenizer: template.Tokenizer, part: Literal["train", "validation"]
    ) -> tuple[Sequence[Any], EncodeReport]:
        """One side in tokens, as ``Data.encode``. Raises UserError where nothing to train on is left."""
        rows, report = self.data.encode(tokenizer, self.train if part == "train" else self.validation)
        if part == "train" and not rows:
            raise UserError(
                f"data.max_length={self.data.max_length}: none of {self.data.source} is left to train on ({report}); "
                "type a larger data.max_length"
            )
        return rows, report

    def fitting(self, tokenizer: template.Tokenizer) -> tuple["Split", EncodeReport, EncodeReport]:
        """Prompts within the lengths of the data, and what became of both sides, as ``Data.fitting``.

        Raises UserError where nothing to train on is left.
        """
        train, training = self.data.fitting(tokenizer, self.train)
        validation, held_out = self.data.fitting(tokenizer, self.validation)
        if not train:
            tighter = self.data.prompt_limit < self.data.max_length
            knob, value = (
                ("max_prompt_length", self.data.max_prompt_length) if tighter else ("max_length", self.data.max_length)
            )
            raise UserError(
                f"data.{knob}={value}: no prompt of {self.data.source} fits ({training}); type a larger one"
            )
        return replace(self, train=train, validation=validation), training, held_out


_CHECKED_EARLY = ContextVar("checked_early", default=True)


@contextmanager
def files_unread() -> Iterator[None]:
    """While it is open, configs are checked without a look into their files: whoever loads them says what is wrong."""
    token = _CHECKED_EARLY.set(False)
    try:
        yield
    finally:
        _CHECKED_EARLY.reset(token)


class Data:
    """Records of one type from one source.

    Arguments:
        record: the record type the stage needs; rows of other shapes are converted where they hold what it takes.
        source: a file, a glob, a folder (of a run), a Hugging Face id (ID or ID:SUBSET), testbed, or arithmetic. A list
            of files, globs and folders is read as one source (the comparisons of all rounds so far): one after the
            other, or row by row in turn where size says how many are read.
        size: testbed: records to train on (null: its default); else the most records that are read, held-out ones among
            them (null: all).
        validation: records held out, as a number (from 1) or a share (below 1). Chosen by the hash of the prompt, not
            by order: another order moves no record from one side to the other, more data few, and records with the same
            prompt stay on one side: the number is met as nearly as whole prompts allow, and a line says so if it is
            not. null: 400 prompts of the testbed, a tenth of anything else. Stages that read one file should hold out
            the same share: then none is measured on prompts that another was trained on.
        max_length: tokens of a row. Texts are cut into rows and demonstrations at the right; comparisons and labels
            lose the oldest turns of their prompt, and are dropped where that is not enough.
        max_prompt_length: tokens of a prompt, as above (null: only max_length counts).
        format: name of a format, `auto` to tell by the fields, or package.module:function (raw dict -> record).
        split: of a Hugging Face data set.
        seed: draws of the testbed, and which records are held out.
        max_bad: share of rows that may be unusable before loading stops.
        tags: added to every prompt, for example [unsafe].
        testbed: the world, for source=testbed.
        arithmetic: the problems, for source=arithmetic.
        streaming: read row by row, records and their tokens kept on disk (in RLHF_CACHE) and not in memory; for texts
            and demonstrations. Everything else, the order of batches and a resume too, is as without it.
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
        # With one source in the list nothing is different from that source.
        self.sources = [source] if isinstance(source, str) else [str(one) for one in source]
        self.source = ", ".join(self.sources)
        if validation is None:
            made_up = self.source in (TESTBED, ARITHMETIC)
            validation = HELD_OUT if made_up and record == "prompt" else HELD_OUT_SHARE
        self.record, self.size, self.validation = record, size, validation
        self.max_length, self.max_prompt_length, self.format = max_length, max_prompt_length, format
        self.split, self.seed, self.max_bad = split, seed, max_bad
        self.tags = tuple(tags or ())
        self.streaming = streaming
        self.places: dict[int, str] | None = None  # id of a record in memory -> "file, row 3", where somebody asks
        self.testbed = testbed or Testbed()
        self.arithmetic = arithmetic or Arithmetic()
        if not self.sources:
            raise UserError("data.source=[]: no source in the list; name a run, a file or testbed")
        if len(self.sources) > 1 and {TESTBED, ARITHMETIC} & set(self.sources):
            raise UserError(f"data.source=[{self.source}]: testbed cannot be one of several; use data=mixture")
        if streaming and record not in ("text", "demonstration"):
            raise UserError(
                f"data.streaming=true: {record}s are kept in memory, texts and demonstrations can be streamed; "
                "leave it out"
            )
        if validation >= 1 and validation != int(validation):
            raise UserError(f"data.validation={validation}: give a whole number of records, or a share below 1")

    @staticmethod
    def check_knobs(**knobs: Any) -> None:
        """Reads small local files before anything runs: what is wrong with them must not be told after hours.

        Raises UserError as ``load`` does. Larger files, runs, and data sets of the hub are read when their step begins.
        """
        size = knobs.get("size")
        if knobs.get("source") in (TESTBED, ARITHMETIC) and type(size) is int and size > MOST_MADE_UP:
            raise UserError(f"data.size={size}: at most {MOST_MADE_UP} records are made up; type a smaller data.size")
        if isinstance(knobs.get("format"), str):
            find_adapter(knobs["format"])  # a name that is none is wrong whatever the source is
        if not _CHECKED_EARLY.get():
            return
        source = knobs.get("source") or []
        files = [Path(str(one)) for one in ([source] if isinstance(source, str) else source)]
        if (
            files
            and all(file.is_file() for file in files)
            and sum(file.stat().st_size for file in files) <= SMALL_FILES
        ):
            own = {name: value for name, value in knobs.items() if name not in ("testbed", "arithmetic")}
            Data(**{"size": None, "validation": 0, "max_length": 2} | own).load()

    def digest(self) -> str:
        """sha256 of what is read: contents of files, the testbed's knobs, or a data set's name."""
        if self.source == TESTBED:
            return hashlib.sha256(json.dumps(self.testbed.knobs(), sort_keys=True).encode()).hexdigest()
        if self.source == ARITHMETIC:
            return hashlib.sha256(json.dumps(self.arithmetic.knobs(), sort_keys=True).encode()).hexdigest()
        files = self._files()
        if files:
            return digest_files(files)
        return hashlib.sha256(f"{self.source}/{self.split}".encode()).hexdigest()

    def load(self) -> Split:
        """All records, split. Raises UserError naming file, row and field where too many rows are unusable."""
        report = LoadReport(source=self.source)
        if self.source in (TESTBED, ARITHMETIC):
            train, validation = self._from_testbed(report)
        else:
            found = (record for _, record in self._placed(report))
            train, validation = self._split(DiskList(found) if self.streaming else list(found), report=report)
        report.train, report.validation = len(train), len(validation)
        if not train:
            raise UserError(f"data.source={self.source}: no {self.record} to train on ({report}); give another source")
        return Split(train, validation, report, self)

    def encode(self, tokenizer: template.Tokenizer, records: Sequence[Record]) -> tuple[Sequence[Any], EncodeReport]:
        """Records to tokens, within max_length and max_prompt_length.

        Gives Encoded for texts and demonstrations, EncodedComparison, EncodedLabel, or list[int] for prompts.
        Documents longer than max_length are cut into several rows, which count as truncated. Raises UserError for a
        chat template that cannot be trained with, or that refuses more than max_bad of the records.
        """
        report = EncodeReport()
        found = self.encoded(tokenizer, records, report)
        rows = DiskList(found) if self.streaming else list(found)
        self._check_refused(report, len(records))
        return rows, report

    def _refuse(self, report: EncodeReport, record: Record, reason: Exception) -> None:
        """Count a record that cannot be encoded, and name the first."""
        report.refused += 1
        if not report.first_refused:
            report.first_refused = f"{self.place(record) or self.source}: {reason}"

    def _check_refused(self, report: EncodeReport, count: int) -> None:
        if report.refused > self.max_bad * count:
            raise UserError(
                f"data.source={self.source}: {report.refused} of {count} records cannot be encoded (data.max_bad="
                f"{self.max_bad} allows {int(self.max_bad * count)}); first: {report.first_refused}"
            )

    def place(self, record: Record) -> str:
        """Return "file, row 3" of the first row that gives this record, by reading the files again; "" if unknown."""
        if self.source in (TESTBED, ARITHMETIC) or not self._files():
            return ""
        found = self._placed(LoadReport(source=self.source))
        return next((f"{row.file}, row {row.row}" for row, other in found if other == record), "")

    def encoded(self, tokenizer: template.Tokenizer, records: Sequence[Record], report: EncodeReport) -> Iterator[Any]:
        """Yield the rows of ``encode``, however many records are refused; `report` counts."""
        if self.record == "text":
            for texts in _batched(record.text for record in records if isinstance(record, Text)):
                for row in template.encode_texts(tokenizer, texts):
                    pieces = row.windows(self.max_length)
                    report.kept += len(pieces)
                    report.truncated += len(pieces) > 1
                    report.tokens += sum(map(len, pieces))
                    yield from pieces
            return
        for record in records:
            assert not isinstance(record, Text)
            asked = record.messages if isinstance(record, Demonstration | Prompt) else record.prompt
            template.check_template(tokenizer, asked)  # raises for a template that suits no record
            try:
                row, cut = self._encode(tokenizer, record)
            except (UserError, ValueError) as error:
                self._refuse(report, record, error)
                continue
            if row is None:
                report.dropped += 1
                continue
            report.kept += 1
            report.truncated += cut
            report.tokens += len(row)
            report.missing_eos += cut_responses(record)
            yield row

    def _encode(
        self, tokenizer: template.Tokenizer, record: Demonstration | Comparison | Label | Prompt
    ) -> tuple[Any, bool]:
        if isinstance(record, Demonstration):
            whole = template.encode_dialogue(tokenizer, record.messages, ended=record.ended)
            cut = template.Encoded(whole.ids[: self.max_length], whole.mask[: self.max_length])
            return (cut if any(cut.mask) else None), len(whole) > self.max_length
        if isinstance(record, Comparison):
            return template.encode_comparison(tokenizer, record, self.max_length, self.max_prompt_length)
        if isinstance(record, Label):
            return template.encode_label(tokenizer, record, self.max_length, self.max_prompt_length)
        return template.fit_prompt(tokenizer, record.messages, self.prompt_limit)

    @property
    def prompt_limit(self) -> int:
        """Most tokens of a record that is a prompt alone."""
        return self.max_length if self.max_prompt_length is None else min(self.max_length, self.max_prompt_length)

    def fitting(self, tokenizer: template.Tokenizer, prompts: Sequence[Prompt]) -> tuple[list[Prompt], EncodeReport]:
        """Prompts within max_length and max_prompt_length: the oldest turns of longer ones go, then the prompt.

        Raises UserError where the chat template refuses more than max_bad of them.
        """
        report = EncodeReport()
        kept = []
        for prompt in prompts:
            try:
                turns, ids = template.fit_messages(tokenizer, prompt.messages, self.prompt_limit)
            except (template.Refused, ValueError) as error:
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

    def _from_testbed(self, report: LoadReport) -> tuple[Sequence[Any], Sequence[Any]]:
        size = self.size or TESTBED_SIZES[self.record]
        held_out = self._held_out(size)
        world = self.testbed if self.source == TESTBED else self.arithmetic
        if self.record == "text":
            train, validation = self._split(list(world.texts(size + held_out, self.seed)), held_out, report)
        else:
            draw: Callable[..., Sequence[Record]] | None = getattr(world, f"{self.record}s", None)
            if draw is None:
                raise UserError(
                    f"data.source={self.source}: has no {self.record}s; it has texts, demonstrations and prompts"
                )
            train, validation = list(draw(size, self.seed)), list(draw(held_out, self.seed, held_out=True))
        report.read = report.kept = len(train) + len(validation)
        return train, validation

    def _held_out(self, n: int) -> int:
        """How many of n records are to be held out; a share above 0 is at least one record."""
        if self.validation >= 1 or self.validation == 0:
            return int(self.validation)
        return max(1, round(self.validation * n))

    def _files(self) -> list[Path]:
        """The local files that are read; empty where the source is a data set of the hub."""
        found = [find_files(source, self.record) for source in self.sources]
        for source, files in zip(self.sources, found, strict=True):
            if len(self.sources) > 1 and not files:
                raise UserError(f"data.source={source}: only files and runs can be one of several; use data=mixture")
        return [file for files in found for file in files]

    def _rows(self) -> Iterator[Row]:
        files = self._files()
        if len(self.sources) > 1 and self.size is not None:
            # In turn, or the first sources would fill the size and the newest round would not be read.
            readers = [read_files(find_files(source, self.record)) for source in self.sources]
            rounds = zip_longest(*readers)
            return (row for rows in rounds for row in rows if row is not None)
        if files:
            return read_files(files)
        return read_hub(self.source, self.split, lazily=self.streaming or self.size is not None)

    def _placed(self, report: LoadReport) -> Iterator[tuple[Row, Record]]:
        """Every record, with the row that it is from."""
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
                if not found:  # of a tie no label is left, of a bad reply nothing to imitate
                    report.ties += self.record == "label"
                    report.unwanted += self.record != "label"
                    continue
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                reason = f"{error.args[0]}: missing" if isinstance(error, KeyError) else str(error)
                report.bad.append(f"{row.file}, row {row.row}: {reason}")
                continue
            if self.size is not None:
                found = found[: self.size - report.kept]  # a row can give several
            report.kept += len(found)
            if self.places is not None:
                self.places |= {id(record): f"{row.file}, row {row.row}" for record in found}
            yield from ((row, record) for record in found)
        if len(report.bad) > self.max_bad * report.read:
            counts = Counter(line.split(": ", 1)[1] for line in report.bad).most_common(3)
            raise UserError(
                f"data.source={self.source}: {len(report.bad)} of {report.read} rows are unusable as {self.record} "
                f"(data.max_bad={self.max_bad} allows {int(self.max_bad * report.read)}); first: {report.bad[0]}; "
                f"most often: {'; '.join(f'{count} x {reason}' for reason, count in counts)}; "
                "mend the file, name its data.format, or raise data.max_bad"
            )

    def _tagged(self, record: Record) -> Record:
        if not self.tags:
            return record
        if isinstance(record, Prompt | Comparison):
            return replace(record, tags=(*record.tags, *self.tags))
        raise UserError(f"data.tags={list(self.tags)}: a {record.name} has no tags; leave it null")

    def _split(
        self, records: Sequence[Any], held_out: int | None = None, report: LoadReport | None = None
    ) -> tuple[Sequence[Any], Sequence[Any]]:
        """(train, validation) by the hash of what the records ask; the order within each side is that of the source.

        Records that ask the same stay on one side, so `held_out` is met as nearly as whole prompts allow; the report
        gets a line where it is not met.
        """
        if held_out is None:
            held_out = self._held_out(len(records))
        if held_out == 0 or not records:
            return records, []
        if held_out >= len(records) and self.validation >= 1:
            share = f"data.validation={HELD_OUT_SHARE}" if len(records) > 1 else "data.validation=0"
            raise UserError(
                f"data.validation={held_out} of {len(records)} records leaves none to train on; type {share}, or a "
                "larger file"
            )
        import numpy as np

        keys = np.fromiter((self._key(record) for record in records), np.uint64, len(records))
        known, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        chosen = nearest_groups(counts.tolist(), held_out)
        if report is not None and sum(counts[chosen]) != held_out:
            report.split = _on_split(held_out, counts.tolist(), chosen)
        side = np.zeros(len(known), bool)
        side[chosen] = True
        out = side[inverse]
        sides = [array("Q", np.flatnonzero(part).tolist()) for part in (~out, out)]
        if self.streaming:
            return View(records, sides[0]), View(records, sides[1])
        return [records[place] for place in sides[0]], [records[place] for place in sides[1]]

    def _key(self, record: Record) -> int:
        """64 bits of the hash of what a record asks."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}\x1e{asked(record)}".encode()).digest()[:8])


def cut_responses(record: Record) -> int:
    """Count the responses of a record that were cut off at a length limit."""
    if isinstance(record, Comparison):
        return 0 if record.ended is None else record.ended.count(False)
    return int(not getattr(record, "ended", True))


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in batches that are cheap to tokenize at once, and small however long the texts are."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) == 256 or size > 1 << 20:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def nearest_groups(sizes: Sequence[int], wanted: int) -> list[int]:
    """Return the places of groups that hold as nearly `wanted` members together as can be, and never all groups.

    Groups are taken in their order where they do not exceed what is wanted, which with many small ones meets it. Else
    the nearest sum is searched, the smaller of two; not where that would take long, for very many groups.
    """
    taken: list[int] = []
    total, everything = 0, sum(sizes)
    for place, size in enumerate(sizes):
        if total + size <= wanted and total + size < everything:
            taken.append(place)
            total += size
        if total == wanted:
            return taken
    if len(sizes) * wanted > SEARCHED:
        return taken
    sums: dict[int, tuple[int, int]] = {0: (-1, 0)}  # sum -> the last group in it, the sum without that group
    for place, size in enumerate(sizes):
        for smaller in list(sums):
            if smaller + size < min(everything, 2 * wanted):
                sums.setdefault(smaller + size, (place, smaller))
    total, taken = min(sums, key=lambda found: (abs(found - wanted), found)), []
    while total:
        place, total = sums[total]
        taken.append(place)
    return taken


def _on_split(wanted: int, sizes: Sequence[int], chosen: Sequence[int]) -> str:
    """Why another number of records is held out than was wanted."""
    found, least, most = sum(sizes[place] for place in chosen), min(sizes), max(sizes)
    if sum(sizes) == 1:
        return "none held out: the only record is trained on"
    if len(sizes) == 1:
        return f"none held out: all {most} records ask the same, and equal prompts stay on one side"
    each = f"{least} records each" if least == most else f"{least} to {most} records each"
    more = "" if found else f"; type data.validation={least} to hold out one prompt"
    return (
        f"{found} held out where {wanted} were asked for: equal prompts stay on one side, and the {len(sizes)} prompts "
        f"have {each}{more}"
    )


def asked(record: Record) -> str:
    """What a record asks: all that is said before its (last) reply; a text as a whole."""
    if isinstance(record, Text):
        return record.text
    if isinstance(record, Demonstration):
        last = max(i for i, message in enumerate(record.messages) if message.role == "assistant")
        return "\x1f".join(message.content for message in record.messages[:last])
    turns = record.messages if isinstance(record, Prompt) else record.prompt
    return "\x1f".join(message.content for message in turns)


def _check_turns(record: Record) -> None:
    """Raises ValueError for a dialogue in which the user or the assistant says nothing.

    A tool may answer nothing. A compared reply may be empty too: that it is worse than another is a preference.
    """
    if isinstance(record, Text):
        return
    messages = record.messages if isinstance(record, Demonstration | Prompt) else record.prompt
    for number, message in enumerate(messages, 1):
        if message.role in ("user", "assistant") and not message.content.strip():
            raise ValueError(f"turn {number} ({message.role}): empty")
