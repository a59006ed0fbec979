"""Conversion of records from one type to another."""

from collections import Counter
from collections.abc import Iterable

from rlhf.data.records import (
    Comparison,
    Demonstration,
    Label,
    Message,
    Prompt,
    Record,
)


def comparison_labels(comparison: Comparison) -> list[Label]:
    """Return responses that win more of their pairs than they lose as good labels, those that lose more as bad.

    Of a pair these are the chosen and the rejected response; the middle of a ranking is neither and is omitted.
    """
    balance = Counter[int]()
    for better, worse, _ in comparison.pairs():
        balance[better] += 1
        balance[worse] -= 1
    return [
        Label(comparison.prompt, response, desirable=balance[i] > 0, ended=comparison.has_ended(i))
        for i, response in enumerate(comparison.responses)
        if balance[i] != 0 and response.strip()
    ]


def convert(record: Record, wanted: str) -> Iterable[Record]:
    """Convert a record to the wanted type, if it contains what that type needs.

    Raises:
        ValueError: If it does not.
    """
    if record.name == wanted:
        return (record,)
    if wanted == "prompt":
        if isinstance(record, Demonstration):
            last = max(i for i, message in enumerate(record.messages) if message.role == "assistant")
            answer = record.messages[last].content
            reference = answer.rpartition("####")[2].strip().replace(",", "") if "####" in answer else None
            return (Prompt(record.messages[:last], reference=reference, cluster=record.cluster),)
        if isinstance(record, Comparison):
            return (Prompt(record.prompt, tags=record.tags, cluster=record.cluster),)
        if isinstance(record, Label):
            return (Prompt(record.prompt),)
    if isinstance(record, Comparison):
        if wanted == "demonstration":
            best = Message("assistant", record.responses[0])
            return (Demonstration((*record.prompt, best), record.has_ended(0), record.cluster),)
        if wanted == "label":
            return comparison_labels(record)
    if wanted == "demonstration" and isinstance(record, Label):
        good = Demonstration((*record.prompt, Message("assistant", record.response)), record.ended)
        return (good,) if record.desirable else ()
    if wanted == "label" and isinstance(record, Demonstration):
        raise ValueError("label: missing, or not one of true, false, 1, 0")
    raise ValueError(f"is a {record.name}, which cannot be converted to a {wanted}")
