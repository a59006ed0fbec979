"""Foreign text in a Markdown page: names of models, paths, commands and configs stay text and become no markup."""

import re
from typing import Any


def line(text: Any) -> str:
    """Return text on one line: line breaks and other control characters become spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split(" ")).strip()


def plain(text: Any) -> str:
    """Return text on one line that reads as it is, outside of code: what Markdown and HTML would read is escaped."""
    return re.sub(r"([\\`*\[\]<>&#~]|(?<!\w)_|_(?!\w))", r"\\\1", line(text))


def code(text: Any) -> str:
    """Return text as code within a line, whatever backticks are in it."""
    content = line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", content)), default=0))
    pad = " " if content.startswith("`") or content.endswith("`") else ""
    return f"{fence}{pad}{content}{pad}{fence}"


def block(text: str, language: str = "") -> str:
    """Return text as a block of code, whatever fences are in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def row(*cells: str) -> str:
    """Return a row of a table, from Markdown of one line per cell."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def literal(text: str) -> str:
    """Return text as a Python string in double quotes, every character that is not printable escaped."""
    return '"' + "".join('\\"' if c == '"' else repr(c)[1:-1] for c in text) + '"'
