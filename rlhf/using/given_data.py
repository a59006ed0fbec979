"""Data that a command reads without training on it: prompts, texts, demonstrations. This module imports no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.data.data import Data
from rlhf.data.held_out import TooFewHeldOut
from rlhf.data.records import Demonstration, Message, Prompt, RecordName, Text
from rlhf.data.sources import TESTBED
from rlhf.data.testbed.world import Testbed
from rlhf.errors import UserError, moved
from rlhf.storage.plain import Plain

HELD_OUT = 400  # default number of the testbed's held-out records, as in conf/data/prompts
ANY_LENGTH = 2**31


def load_prompts(source: str, world: Plain | None, limit: int | None, flag: str = "--prompts") -> list[Prompt]:
    """Load the prompts of a file, glob, directory or data set in any format, or the testbed's held-out ones.

    In a text file every line is a prompt (or every paragraph, if empty lines separate them).

    Args:
        source: Path, glob, hub id or ``testbed``.
        world: The config node of the testbed's world, for ``testbed``; None: the default world.
        limit: Maximum number of prompts, the first ones; None: all (of the testbed: 400).
        flag: The command-line option of the source, for error messages.

    Raises:
        UserError: Nothing can be read.
    """
    plain_text = Path(source).name.removesuffix(".gz").endswith(".txt")
    return _load("prompt", source, world, limit, flag, f"{__name__}:line" if plain_text else "auto")


def load_documents(
    kind: RecordName, source: str, world: Plain | None, limit: int | None, flag: str
) -> list[Text] | list[Demonstration]:
    """Load texts or demonstrations, as ``load_prompts`` loads prompts."""
    return _load(kind, source, world, limit, flag, "auto")


def line(raw: Mapping[str, Any]) -> Prompt:
    """Convert a row of a text file to a prompt: a dialogue of one user turn."""
    return Prompt((Message("user", str(raw["text"]).strip()),))


def _load(kind: RecordName, source: str, world: Plain | None, limit: int | None, flag: str, format: str) -> list[Any]:
    held_out = source == TESTBED
    hyperparameters = {key: value for key, value in (world or {}).items() if key != "_target_"}
    data = Data(
        record=kind,
        source=source,
        size=1 if held_out else limit,
        validation=(limit or HELD_OUT) if held_out else 0,
        max_length=ANY_LENGTH,
        format=format,
        testbed=Testbed(**hyperparameters),
    )
    try:
        split = data.load()
    except TooFewHeldOut as error:
        if not held_out or error.available >= (limit or HELD_OUT):
            raise
        # A limit is a maximum: use all prompts that are available.
        return _load(kind, source, world, error.available, flag, format)
    except UserError as error:
        _name_option(error, flag)
        raise
    report = split.report
    if report.bad or report.ties:
        dropped = f"; the first unusable: {report.bad[0]}" if report.bad else ""
        print(f"{flag} {source}: {report.read} rows read, {report.kept} used{dropped}")
    records = split.validation if held_out else split.train
    return list(records if limit is None else records[:limit])


def _name_option(error: UserError, flag: str) -> None:
    """Rename the data's config keys in an error, which only training reads, to the option of the command."""
    for finding in error.findings:
        if any(name != "data.source" for name in finding.fix_keys):
            finding.fix = "fix the file"
    error.rename(moved("data.source", flag))
