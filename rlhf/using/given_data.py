"""Data that a command is given to use, none of it to train on: prompts, texts, demonstrations. No torch here."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.config import Plain
from rlhf.data.data import Data
from rlhf.data.records import Demonstration, Message, Prompt, RecordName, Text
from rlhf.data.sources import TESTBED
from rlhf.data.testbed.world import Testbed
from rlhf.errors import UserError

HELD_OUT = 400  # of the testbed, where no number is given; as conf/data/prompts
ANY_LENGTH = 2**31


def load_prompts(source: str, world: Plain | None, limit: int | None, flag: str = "--prompts") -> list[Prompt]:
    """The prompts of a file, glob, folder or data set in any format, or the testbed's held-out ones.

    In a text file every line is a prompt (or every paragraph, where empty lines part them).

    Args:
        source: What to read.
        world: The node of the testbed's world, for ``testbed``; None: the default world.
        limit: The most prompts, the first ones; None: all (of the testbed: 400).
        flag: What the source was typed as.

    Raises:
        UserError: There is nothing that can be read.
    """
    plain_text = Path(source).name.removesuffix(".gz").endswith(".txt")
    return _load("prompt", source, world, limit, flag, f"{__name__}:line" if plain_text else "auto")


def load_documents(
    kind: RecordName, source: str, world: Plain | None, limit: int | None, flag: str
) -> list[Text] | list[Demonstration]:
    """As ``load_prompts``, for texts or demonstrations."""
    return _load(kind, source, world, limit, flag, "auto")


def line(raw: Mapping[str, Any]) -> Prompt:
    """A format: the text is what the user says."""
    return Prompt((Message("user", str(raw["text"]).strip()),))


def _load(kind: RecordName, source: str, world: Plain | None, limit: int | None, flag: str, format: str) -> list[Any]:
    held_out = source == TESTBED
    knobs = {key: value for key, value in (world or {}).items() if key != "_target_"}
    data = Data(
        record=kind,
        source=source,
        size=1 if held_out else limit,
        validation=(limit or HELD_OUT) if held_out else 0,
        max_length=ANY_LENGTH,
        format=format,
        testbed=Testbed(**knobs),
    )
    try:
        split = data.load()
    except UserError as error:
        fewer = re.search(r"the testbed holds out (\d+) different prompts", str(error))
        if held_out and fewer and int(fewer[1]) < (limit or HELD_OUT):
            return _load(kind, source, world, int(fewer[1]), flag, format)  # a limit is the most, not a wish
        raise UserError(_as_typed(str(error), kind, flag)) from error
    report = split.report
    if report.bad or report.ties:
        dropped = f"; the first unusable: {report.bad[0]}" if report.bad else ""
        print(f"{flag} {source}: {report.read} rows read, {report.kept} used{dropped}")
    records = split.validation if held_out else split.train
    return list(records if limit is None else records[:limit])


def _as_typed(message: str, kind: str, flag: str) -> str:
    """What the data set says of itself, in the words of a command that trains nothing."""
    message = message.replace("data.source=", f"{flag} ").replace(f"no {kind} to train on", f"holds no usable {kind}")
    message = re.sub(r" \(data\.max_bad=[^)]*\)", "", message)
    message = message.replace("; give one with data.format=NAME", "")
    return re.sub(r"(?:mend the file, name its data\.format.*|; set data\..*)$", "mend the file", message)
