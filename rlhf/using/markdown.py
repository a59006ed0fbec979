"""Escaping of untrusted text for a Markdown page, so that names, paths, commands and configs never become markup."""

import re
from typing import Any


def line(text: Any) -> str:
    """Return text on one line, with spaces in place of line breaks and other control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split(" ")).strip()


def plain(text: Any) -> str:
    """Return text on one line, outside of code, with all characters escaped that Markdown or HTML would interpret."""
    return re.sub(r"([\\`*\[\]<>&#~]|(?<!\w)_|_(?!\w))", r"\\\1", line(text))


def code(text: Any) -> str:
    """Return text as inline code, with a fence longer than any run of backticks in it."""
    content = line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", content)), default=0))
    pad = " " if content.startswith("`") or content.endswith("`") else ""
    return f"{fence}{pad}{content}{pad}{fence}"


def block(text: str, language: str = "") -> str:
    """Return text as a code block, with a fence longer than any in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def row(*cells: str) -> str:
    """Return a table row from cells of one-line Markdown."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def literal(text: str) -> str:
    """Return text as a Python string literal in double quotes, with every non-printable character escaped."""
    return '"' + "".join('\\"' if c == '"' else repr(c)[1:-1] for c in text) + '"'
