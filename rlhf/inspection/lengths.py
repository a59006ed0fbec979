"""Lengths of records in tokens, and their histogram in text characters."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf.data.control_tokens import Tokenizer
from rlhf.data.encoded_rows import EncodedComparison, EncodedLabel
from rlhf.data.encoding import encode_prompt
from rlhf.data.record_encoder import EncodeReport
from rlhf.data.records import Comparison, Demonstration, Label, Prompt, Record, Text
from rlhf.data.rendering import DialogueRejected, control_tokens
from rlhf.data.split import Split
from rlhf.inspection.work import tokens_of

BAR = 40  # length of the longest bar, in characters
BINS = 10


@dataclass
class Lengths:
    """Result of tokenising one side (training or held-out) of the data. Lists of integers hold one number per row.

    Attributes:
        prompt, response, total: Tokens; of a dialogue the response is everything that is trained on.
        trained, read: Total tokens of the side that the loss counts, and that a model reads.
        truncated, dropped: (number of the record from 1 and its place, its first words) of records that do not fit.
        refused: The same for records that the chat template cannot render; `reason` is the error of the first.
        spelled: The same for records that spell a control token, with the token instead of the first words.
    """

    prompt: list[int] = field(default_factory=list)
    response: list[int] = field(default_factory=list)
    total: list[int] = field(default_factory=list)
    trained: int = 0
    read: int = 0
    truncated: list[tuple[str, str]] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    reason: str = ""
    spelled: list[tuple[str, str]] = field(default_factory=list)


def measure(
    split: Split, records: Sequence[Record], tokenizer: Tokenizer, places: Mapping[int, str], room: int | None = None
) -> Lengths:
    """Measure the lengths of records with ``Data.encode``'s rules, one by one, to know which of them do not fit.

    Args:
        split: The split that holds the records.
        records: One side of it.
        tokenizer: The stage's tokenizer.
        places: File and row of records, by their id; not known for all.
        room: Maximum tokens of a prompt, for stages that sample: these do not cut prompts but raise for longer ones.
    """
    found, report = Lengths(), EncodeReport()
    controls = control_tokens(tokenizer)
    for number, record in enumerate(records, 1):
        which = f"record {number}" + (f" ({places[id(record)]})" if id(record) in places else "")
        token = next(filter(None, map(controls.first, _contents(record))), None)
        if token is not None:
            found.spelled.append((which, token))
        if isinstance(record, Prompt) and room is not None:
            try:
                found.prompt.append(len(encode_prompt(tokenizer, record.messages)))
            except DialogueRejected as refused:
                found.refused.append((which, beginning(record)))
                found.reason = found.reason or str(refused)
                continue
            if found.prompt[-1] > room:
                found.dropped.append((which, beginning(record)))
            continue
        before = replace(report)
        for row in split.data.iter_encoded(tokenizer, [record], report):
            _add(found, row)
        for misfits, count in (
            (found.refused, report.refused - before.refused),
            (found.dropped, report.dropped - before.dropped),
            (found.truncated, report.truncated - before.truncated),
        ):
            if count:
                misfits.append((which, beginning(record)))
    found.reason = found.reason or report.first_refused
    return found


def _contents(record: Record) -> Iterator[str]:
    """Yield all texts of a record."""
    if isinstance(record, Text):
        yield record.text
        return
    turns = record.messages if isinstance(record, Demonstration | Prompt) else record.prompt
    yield from (turn.content for turn in turns)
    if isinstance(record, Comparison):
        yield from record.responses
    if isinstance(record, Label):
        yield record.response


def _add(found: Lengths, row: Any) -> None:
    if isinstance(row, list):
        found.prompt.append(len(row))
        return
    read, trained = tokens_of(row)
    found.read += read
    found.trained += trained
    if isinstance(row, EncodedComparison):
        found.prompt.append(len(row.prompt))
        found.response += [len(row.responses[index]) for index in row.used]
        found.total += [len(row.prompt) + len(row.responses[index]) for index in row.used]
        return
    if isinstance(row, EncodedLabel) or not all(row.mask):
        found.prompt.append(read - trained)
        found.response.append(trained)
    found.total.append(read)


def beginning(record: Record, width: int = 60) -> str:
    """Return the first words of a record's text or first user turn."""
    if isinstance(record, Text):
        text = record.text
    else:
        turns = record.messages if isinstance(record, Demonstration | Prompt) else record.prompt
        text = next((turn.content for turn in turns if turn.role == "user"), turns[0].content)
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 1]}…"


def histogram(name: str, lengths: Sequence[int]) -> Iterator[str]:
    """Yield a line of statistics, and a bar for each of at most ten equal ranges; nothing for no lengths."""
    if not lengths:
        return
    ordered = sorted(lengths)
    middle, late = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    mean = sum(ordered) / len(ordered)
    yield f"{name}: {ordered[0]} to {ordered[-1]} tokens, mean {mean:.1f}, median {middle}, 95% within {late}"
    width = max(1, -(-(ordered[-1] - ordered[0] + 1) // BINS))
    counts = [0] * (1 + (ordered[-1] - ordered[0]) // width)
    for length in ordered:
        counts[(length - ordered[0]) // width] += 1
    digits = len(str(ordered[0] + width * len(counts) - 1))
    for index, count in enumerate(counts):
        first = ordered[0] + index * width
        bar = "█" * max(1 if count else 0, round(BAR * count / max(counts)))
        last = first + width - 1
        span = f"{first:>{digits}}" if width == 1 else f"{first:>{digits}}-{last:<{digits}}"
        yield f"  {span} {bar} {count}"
