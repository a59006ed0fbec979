"""Question templates of the judge, and the parser of its answers."""

import re
from collections.abc import Sequence
from pathlib import Path

from rlhf.data.records import Message
from rlhf.errors import UserError

# Question templates by name; a text file with the same three fields may be given instead.
TEMPLATES = {
    "short": "{prompt}\nA: {first}\nB: {second}",
    "instruction": (
        "Two assistants replied to a message. Which reply is better? Prefer the one that is correct, does what was "
        "asked, is harmless and wastes no words. Ignore the order in which they are shown.\n\n"
        "Message:\n{prompt}\n\nReply A:\n{first}\n\nReply B:\n{second}\n\n"
        "Answer with one letter, A or B, and nothing else."
    ),
}


def read_template(template: str, option: str) -> str:
    """Return the text of a template, by name or from a text file.

    Args:
        template: The name or the path.
        option: Config key that it was typed for.

    Raises:
        UserError: If there is no such template, or if it lacks a field.
    """
    text = TEMPLATES.get(template)
    if text is None:
        # The path needs a slash: a run's fingerprint hashes the content of values that look like a path.
        if "/" not in template or not Path(template).expanduser().is_file():
            raise UserError(
                "no such template",
                fix=f"type one of {', '.join(TEMPLATES)}, or the path of a text file with a slash in it, such as "
                "./judge.txt",
                option=option,
                value=template,
            )
        text = Path(template).expanduser().read_text(encoding="utf-8")
    missing = [field for field in ("{prompt}", "{first}", "{second}") if field not in text]
    if missing:
        raise UserError(
            f"lacks {' and '.join(missing)}",
            fix="write {prompt}, {first} and {second} in the template",
            option=option,
            value=template,
        )
    return text


def fill(template: str, prompt: Sequence[Message], first: str, second: str) -> str:
    """Return a template filled with a dialogue and two responses; braces in those are left unchanged."""
    asked = prompt[0].content if len(prompt) == 1 else "\n".join(f"{turn.role}: {turn.content}" for turn in prompt)
    values = {"prompt": asked, "first": first, "second": second}
    return re.sub(r"\{(prompt|first|second)\}", lambda match: values[match[1]], template)


# The article: at the start of a sentence, and not followed by a verb or comparison of which option A is the subject.
_ARTICLE = re.compile(
    r"(?:^|[.!?:;\n\"(])\s*(A) (?:[a-z]+ly )*+"
    r"(?!(?:is|was|has|had|does|did|will|would|can|could|should|may|might|and|or|over|than|because|since|as|but|by|in|"
    r"with|on|to|for)\b|(?:better|more)(?: than\b|\W*$)|[a-z]+(?:[^su]s|ed)\b)[a-z]"
)


_BETTER = re.compile(
    r"\b([AB])\b((?:(?!\b[AB]\b)[^.;])*?)\b(?:better|best|wins|stronger|superior|preferable|preferred)\b"
)


_WORSE = re.compile(r"\b([AB])\b((?:(?!\b[AB]\b)[^.;])*?)\b(?:worse|worst|loses|weaker|inferior)\b")


_OVER = re.compile(
    r"\b(?:prefer|choose|chose|pick)\w* (?:\w+ )?([AB])\b|\b([AB])\b (?:over|beats|outperforms) (?:\w+ )?[AB]\b|"
    r"\b([AB]) ?> ?[AB]\b|\b[AB] ?< ?([AB])\b|"
    r"(?i:\b(?:answer|verdict|choice|winner)\b\W*(?:is\b\W*)?(?:(?:reply|response|option)\W*)?)"
    r"\b([AB])\b(?! (?:and|or)\b)"
)


_NEGATED = re.compile(r"\b(?:not|never|neither|nor|no)\b|n't\b", re.IGNORECASE)


_TIE = re.compile(r"\b(?:tie|tied|draw|equal|equally|toss-up|neither)\b", re.IGNORECASE)


def parse(text: str) -> float | None:
    """Parse a generated answer: 1 for A, -1 for B, 0 for a tie, None for an unreadable one.

    The last [[A]], [[B]] or [[C]] (a tie) decides; else the option that is called better, or the other of the one that
    is called worse; else the only option that is named; else a word for a tie. An "A" that is an article ("A close
    call") names no option.
    """
    marked = re.findall(r"\[\[(A|B|C)\]\]", text)
    if marked:
        return {"A": 1.0, "B": -1.0, "C": 0.0}[marked[-1]]
    if text.strip(" \n*.()") in ("a", "b"):
        text = text.upper()
    text = _ARTICLE.sub(lambda match: match[0].replace("A", "a", 1), text)
    named = set(re.findall(r"\b[AB]\b", text))
    if len(named) < 2 or not _TIE.search(text):
        winners = {match[1] for match in _BETTER.finditer(text) if not _NEGATED.search(match[2])}
        winners |= {"AB"[match[1] == "A"] for match in _WORSE.finditer(text) if not _NEGATED.search(match[2])}
        winners |= {next(filter(None, match.groups())) for match in _OVER.finditer(text)}
        if len(winners) == 1:
            return 1.0 if winners == {"A"} else -1.0
        if len(named) == 1 and not winners:
            return None if _NEGATED.search(text) else 1.0 if named == {"A"} else -1.0
    tied = bool(_TIE.search(text)) and not re.search(r"\b(?:not|no|n't) (?:a )?(?:tie|draw|equal)", text, re.IGNORECASE)
    return 0.0 if tied and len(named) != 1 else None
