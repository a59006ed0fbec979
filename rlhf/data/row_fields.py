"""Fields of raw rows, read by name and validated."""

from collections.abc import Sequence

from rlhf.data.records import (
    GRADES,
    TIE,
)
from rlhf.data.turns import Raw

_GRADE_WORDS = {
    **{grade: grade for grade in GRADES},
    TIE: TIE,
    "significantly better": "significantly",
    "slightly better": "slightly",
    "negligibly": "negligible",
    "negligibly better": "negligible",
    "negligibly better / unsure": "negligible",
    "unsure": "negligible",
    "much better": "significantly",  # strongest of HelpSteer's three grades; mapped to the strongest of Llama 2's four
    "clearly better": "better",
    **dict.fromkeys(("equal", "equally good", "same", "about the same"), TIE),
}
_MARKS = {
    **dict.fromkeys(("true", "1", "yes", "good", "desirable", "up"), True),
    **dict.fromkeys(("false", "0", "no", "bad", "undesirable", "down"), False),
}


def read_string(raw: Raw, *keys: str) -> str:
    """Return the first of the fields that is present, which must be a string."""
    for key in keys:
        if raw.get(key) is not None:
            if not isinstance(raw[key], str):
                raise ValueError(f"{key}: expected a string, got {type(raw[key]).__name__}")
            return str(raw[key])
    raise ValueError(f"{keys[0]}: missing")


def read_cluster(raw: Raw) -> str:
    """Return the field "cluster", equal for paraphrases; "" if it is missing."""
    return str(raw.get("cluster") or "")


def read_tags(raw: Raw) -> tuple[str, ...]:
    """Return the field "tags", a string or a list of strings."""
    tags = raw.get("tags") or ()
    if isinstance(tags, str):
        return (tags,)
    if not isinstance(tags, list | tuple) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f"tags: expected a list of strings, got {tags!r}")
    return tuple(tags)


def read_mark(raw: Raw, *fields: str) -> bool | None:
    """Return whether the first present field marks a response as good; None if none does with a known word."""
    mark = next((raw[field] for field in fields if raw.get(field) is not None), None)
    if isinstance(mark, str):
        return _MARKS.get(mark.strip().lower())
    return bool(mark) if isinstance(mark, int | float) and mark in (0, 1) else None


def read_grade(raw: Raw) -> str | None:
    """Return the field "grade" as one of GRADES or TIE, whose usual synonyms are known; None if it is missing."""
    grade = raw.get("grade")
    if grade is None or grade == "":
        return None
    known = _GRADE_WORDS.get(str(grade).strip().lower().replace("_", " "))
    if known is None:
        raise ValueError(f"grade: {grade!r} is not one of {', '.join((*GRADES, TIE))}")
    return known


def read_ended(raw: Raw) -> bool:
    """Return whether the only response of a row is complete; without the field it is, as if written by a person."""
    ended = raw.get("ended")
    if ended is not None and not isinstance(ended, bool):
        raise ValueError(f"ended: expected true or false, got {ended!r}")
    return ended is not False


def read_marks(raw: Raw, field: str, order: Sequence[int]) -> tuple[bool, ...] | None:
    """Return a boolean field of each response, in the given order of responses; None if it is missing."""
    marks = raw.get(field)
    if marks is None:
        return None
    if not isinstance(marks, list | tuple) or not all(isinstance(mark, bool) for mark in marks):
        raise ValueError(f"{field}: expected true or false for each response, got {marks!r}")
    if len(marks) != len(order):
        raise ValueError(f"{field}: {len(marks)} for {len(order)} responses")
    return tuple(marks[index] for index in order)


def read_numbers(raw: Raw, field: str) -> list[float] | None:
    """Return a numeric field of each response; None if it is missing."""
    values = raw.get(field)
    if values is None:
        return None
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError):
        raise ValueError(f"{field}: expected a number for each response, got {values!r}") from None


def read_pair_scores(raw: Raw) -> tuple[float, ...] | None:
    """Return the scores of the better and the worse response of a pair; None if they are missing."""
    for better, worse in (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score")):
        if raw.get(better) is not None and raw.get(worse) is not None:
            return (float(raw[better]), float(raw[worse]))
    scores = read_numbers(raw, "scores")
    return None if scores is None else tuple(scores)
