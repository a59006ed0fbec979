"""Page `rlhf inspect data`: rows read, kept, dropped and cut, with reasons; lengths, grades, tags, and examples."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.text import Text as Line

from rlhf import console
from rlhf.data.data import Data, skip_file_checks
from rlhf.data.load_report import LoadReport
from rlhf.data.mixture import Mixture
from rlhf.data.records import TIE, Comparison, Demonstration, Label, Prompt, Record, Text, count_truncated
from rlhf.data.sources import TESTBED
from rlhf.data.split import Split, load_split
from rlhf.inspection import tokens
from rlhf.inspection.composing import Look, chosen, not_made, planned
from rlhf.inspection.lengths import Lengths, beginning, histogram, measure
from rlhf.planning.step import Step
from rlhf.planning.validation.stage import find_unread_data

SHOWN = 10  # maximum number of bad rows, and of records that do not fit, that are listed


def show(words: Sequence[str], step: str | None, rows: int) -> None:
    """Print the page.

    Args:
        words: The command line of a run.
        step: Step of a pipeline; None: the last.
        rows: Number of records to print.

    Raises:
        UserError: A command line that could not be run, data that is missing, a stage that reads none.
    """
    with skip_file_checks():  # this page reports bad rows itself
        made = planned(words)
    look = Look(made.steps)
    selected = chosen(made, step)
    groups = look.data(selected)
    for name, data in groups.items():
        maker = look.unread(data)
        if maker is not None:
            raise not_made(name, data, maker)
    places: dict[int, str] = {}
    for name in find_unread_data(selected.config):
        if selected.config.get(name) is not None:
            console.say(f"{selected.name}: {name} is not read by this run, and not shown", "dim")
    splits = {name: _load(name, data, places) for name, data in groups.items()}
    tokenizer, room = _reader(look, selected, splits)
    for name, split in splits.items():
        console.say(f"{selected.name}: {name} ({split.data.record}s of {split.data.source})", "bold")
        if split.data.source == TESTBED and _own_model(words, made.steps[0]) and not _names_data(words, name):
            console.say(
                f"this is the testbed's data, because the command names no data; type {name}=NAME "
                f"{name}.source=FILE, or {name}.source=testbed to confirm it",
                "yellow",
            )
        _loaded(name, split)
        sampled = room if name == "data" else None
        train = measure(split, split.train, tokenizer, places, sampled)
        held_out = measure(split, split.validation, tokenizer, places, sampled)
        _fit(name, split, train, held_out, sampled)
        for title, lengths in (("prompt", train.prompt), ("response", train.response), ("total", train.total)):
            for line in histogram(title, lengths):
                console.say(line)
        _contents(split.train)
        for number, record in enumerate(split.train[:rows], 1):
            for written in _written(number, record):
                console.console().print(written)
        console.say("")


def _keys(words: Sequence[str]) -> list[str]:
    return [word.partition("=")[0].lstrip("+~") for word in words]


def _names_data(words: Sequence[str], group: str) -> bool:
    """Return whether a word sets the source of a group's data: an option, a source, an input."""
    return any(re.search(rf"(^|[.@]){group}(@.*|\.source)?$|(^|\.)inputs\.", key) for key in _keys(words))


def _own_model(words: Sequence[str], first: Step) -> bool:
    """Return whether the words name a model that has weights."""
    named = any(re.search(r"(^|[.@])model(@.*|\.path)?$", key) for key in _keys(words))
    return named and bool((first.config.get("model") or {}).get("path"))


def _load(name: str, data: Data, places: dict[int, str]) -> Split:
    """Load all records, whatever the share of unusable rows, since this page lists them.

    Fills ``places`` with the file and row of each record that stays in memory, by its id.
    """
    allowed = data.max_bad
    parts: list[Data] = list(data.parts.values()) if isinstance(data, Mixture) else [data]
    limits = [part.max_bad for part in parts]
    for part in parts:
        part.max_bad = 1.0
        part.places = None if part.streaming else places
    try:
        return load_split(data, name)
    finally:
        data.max_bad = allowed
        for part, limit in zip(parts, limits, strict=True):
            part.max_bad = limit


def _reader(look: Look, step: Step, splits: dict[str, Split]) -> tuple[Any, int | None]:
    """Return the stage's tokenizer, and the maximum length of a prompt in tokens if the stage samples, else None."""
    stage = look.stage(step, loaded=splits)
    model = look.policy(stage)
    sampler = getattr(stage, "sampler", None)
    return model.tokenizer, None if sampler is None else model.context_length - sampler.room(model)


def _loaded(name: str, split: Split) -> None:
    """Print the numbers of rows read, kept and dropped."""
    report: LoadReport = split.report
    rows = [
        ("rows read", f"{report.read:,}", ""),
        (
            "records kept",
            f"{report.train + report.validation:,}",
            f"{report.train:,} train, {report.validation:,} held out",
        ),
        ("ties dropped", f"{report.ties:,}", "no preference, or the same text twice"),
        ("bad responses left out", f"{report.unwanted:,}", "marked bad (label false), so not trained on"),
        ("unusable rows dropped", f"{len(report.bad):,}", "below, with file, row and field"),
    ]
    console.print_table("", ("", "", ""), [row for row in rows if row[1] != "0" or row[0] == "rows read"])
    if report.split:
        console.say(f"  {report.split}", "yellow")
    for row in report.bad[:SHOWN]:
        console.say(f"  dropped: {row}", "yellow")
    if len(report.bad) > SHOWN:
        reasons = Counter(row.reason for row in report.bad).most_common(SHOWN)
        console.say(
            f"  and {len(report.bad) - SHOWN} more; by reason: " + "; ".join(f"{n} x {why}" for why, n in reasons)
        )
    limit = split.data.max_bad
    if len(report.bad) > limit * report.read:
        console.say(
            f"  training refuses this: {name}.max_bad={limit} allows {int(limit * report.read)} such rows", "red"
        )


def _fit(name: str, split: Split, train: Lengths, held_out: Lengths, room: int | None) -> None:
    """Print the records that do not fit, and the share of tokens that is trained on."""
    for side, lengths in (("train", train), ("held out", held_out)):
        if lengths.spelled:
            which, token = lengths.spelled[0]
            console.say(
                f"{side}: {len(lengths.spelled)} records spell a control token, which is encoded as text "
                f"(first: {which}: {token})",
                "yellow",
            )
        if lengths.refused:
            console.say(
                f"{side}: {len(lengths.refused)} records dropped, they cannot be encoded ({lengths.reason}):", "yellow"
            )
        _listed(lengths.refused)
        if room is not None and lengths.dropped:
            console.say(
                f"{side}: {len(lengths.dropped)} prompts are longer than {room} tokens, training refuses them:", "red"
            )
        elif lengths.dropped:
            limit = f"{name}.max_length={split.data.max_length}"
            console.say(f"{side}: {len(lengths.dropped)} records dropped, they do not fit {limit}:", "yellow")
        _listed(lengths.dropped)
        if lengths.truncated:
            console.say(
                f"{side}: {len(lengths.truncated)} records cut to {name}.max_length={split.data.max_length}:",
                "yellow",
            )
        _listed(lengths.truncated)
    misfits = (side.dropped or side.truncated or side.refused for side in (train, held_out))
    if not any(misfits):
        console.say("every record fits, none is cut")
    if train.read:
        share = train.trained / train.read
        console.say(f"trained on: {train.trained:,} of {train.read:,} tokens ({share:.1%})")


def _listed(records: Sequence[tuple[Any, str]]) -> None:
    """Print the first ``SHOWN`` records, and the number of the others."""
    for which, words in records[:SHOWN]:
        console.say(f"  {which}: {words}")
    if len(records) > SHOWN:
        console.say(f"  ... {len(records) - SHOWN} more")


def _contents(records: Sequence[Record]) -> None:
    """Print counts of grades, tags, labels and turns."""
    counted: dict[str, Counter[str]] = {
        "grades": Counter(), "responses per prompt": Counter(), "tags": Counter(), "labels": Counter(),
        "turns": Counter(),
    }  # fmt: skip
    for record in records:
        if isinstance(record, Comparison):
            count = len(record.responses)
            counted["grades"].update(grade or "none" for grade in record.grades or [None] * (count * (count - 1) // 2))
            counted["responses per prompt"][str(count)] += 1
        if isinstance(record, Comparison | Prompt):
            counted["tags"].update(record.tags or ("none",))
        if isinstance(record, Label):
            counted["labels"]["good" if record.desirable else "bad"] += 1
        if isinstance(record, Demonstration):
            counted["turns"][f"{sum(message.role == 'assistant' for message in record.messages)} responses"] += 1
    cut = sum(map(count_truncated, records))
    if cut:
        console.say(f"cut off: {cut:,} responses reached a length limit; they are trained on without an end-of-turn")
    for name, counts in counted.items():
        if counts:
            console.say(f"{name}: " + ", ".join(f"{what} {count:,}" for what, count in counts.most_common()))


def _written(number: int, record: Record) -> list[Line]:
    """Return a record as lines of text."""
    head = Line(f"record {number}: {beginning(record)}", "bold" if tokens.coloured() else "")
    if isinstance(record, Text):
        return [Line(f"record {number}", head.style), Line(f"  {_cut(record.text)}")]
    turns = record.messages if isinstance(record, Demonstration | Prompt) else record.prompt
    lines = [Line(f"record {number}", head.style), *(Line(f"  {turn.role}: {_cut(turn.content)}") for turn in turns)]
    if isinstance(record, Comparison):
        grades = iter(record.grades)
        for place, response in enumerate(record.responses):
            best, cut = ", the best" if place == 0 else "", "" if record.has_ended(place) else ", cut off"
            lines.append(Line(f"  response {place + 1}{best}{cut}: {_cut(response)}"))
        if record.grades:
            lines.append(
                Line(f"  grades: {', '.join(str(grade or TIE if grade == TIE else grade) for grade in grades)}")
            )
    if isinstance(record, Label):
        lines.append(Line(f"  {'good' if record.desirable else 'bad'} response: {_cut(record.response)}"))
    if isinstance(record, Prompt) and record.reference is not None:
        lines.append(Line(f"  reference answer: {record.reference}"))
    return lines


def _cut(text: str, width: int = 300) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= width else f"{text[:width]}… ({len(text)} characters)"
