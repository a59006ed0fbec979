"""Screen output: control characters are shown and not obeyed, and no encoding ends a run.

Data, configs, models and errors hold text of strangers, and a terminal obeys the escape sequences in it: they move the
cursor, change the title, hide lines. So `screen` puts a cleaning stream in place of standard output and error, whatever
writes to them, and `Screen` cleans what rich renders. Standard library and rich only.
"""

import io
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# C0 without tab and line feed as their Unicode pictures; DEL, C1, and what overrides the direction of text (UAX 9).
_PICTURES: dict[int, str] = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}
_PICTURES |= {0x7F: "\u2421"} | dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "�")


def shell(*words: object) -> str:
    """Return words as a command line that can be typed, quoted where a shell would take them apart."""
    return shlex.join(str(word) for word in words)


def clean(text: str) -> str:
    """Return the text with a visible sign in place of each control character; tabs and line feeds stay."""
    return text.translate(_PICTURES)


class CleanStream:
    """Text stream that cleans what is written to it; in all else the stream that it wraps.

    A carriage return at the very beginning of a write is kept: progress bars of libraries redraw their line with it.
    """

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = raw(stream)  # where rich, whose own escapes are wanted, writes
        self._stream = stream

    def write(self, text: str) -> int:
        body = text.removeprefix("\r")
        self._stream.write(text[: len(text) - len(body)] + clean(body))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def raw(stream: Any) -> Any:
    """Return the stream at the bottom, below what cleans it and below rich's live displays."""
    while (below := getattr(stream, "rich_proxied_file", None)) is not None:
        stream = below
    return stream


class Screen(Console):
    """A rich console that cleans the text it renders and reads no markup: `[red]` in data is five characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**({"markup": False, "emoji": False, "highlight": False} | options))

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            as_it_is = segment.control or segment.text.isprintable() and segment.text.isascii()
            yield segment if as_it_is else Segment(clean(segment.text), segment.style)


@contextmanager
def screen() -> Iterator[None]:
    """While it is open, standard output and error are clean, and a character that they cannot encode becomes `?`."""
    before = sys.stdout, sys.stderr
    for stream in map(raw, before):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.stdout, sys.stderr = (cast(TextIO, CleanStream(raw(stream))) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
