"""Held-out prompts that a model was trained on: every run writes down its own, and whoever measures on them is told.

What is held out of a file is cut by the hash of the prompt, so stages that read the same file with the same share hold
out the same prompts. With another share, or another file with some of the same prompts, they do not. The testbed parts
its questions by itself. No torch here.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.data.data import Split, asked
from rlhf.data.records import Record, Text
from rlhf.data.sources import ARITHMETIC, TESTBED
from rlhf.errors import first_line
from rlhf.runs import Run, run_of

FILE = "trained_on.npy"  # in a run folder: 64 bits of the hash of each prompt of its training records, sorted


def write(folder: Path, data: Any) -> None:
    """Writes down what a run trains on; nothing for the testbed and for texts, which ask nothing."""
    if isinstance(data, Split) and not _made_up(data) and data.train and not isinstance(data.train[0], Text):
        keys = np.unique(_keys(data.train))
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f".{FILE}").open("wb") as file:
            np.save(file, keys)
        (folder / f".{FILE}").replace(folder / FILE)


def of_stage(folder: Path, data: Any) -> list[str]:
    """What is to be said of the held-out prompts of a run that begins: a line for each ancestor that learnt them.

    Nothing of comparisons that a run has made: they ask training prompts by design.
    """
    if not isinstance(data, Split) or _made_up(data) or any(run_of(Path(source)) for source in _sources(data)):
        return []
    held_out = [record for record in data.validation if not isinstance(record, Text)]
    return overlaps(held_out, _ancestors(Run(folder)), getattr(data.data, "validation", None))


def of_models(prompts: Sequence[Record], models: Iterable[Path | str | None]) -> list[str]:
    """The same for prompts that models are measured on: a line for each run, of the models or before them."""
    learnt: dict[str, Path] = {}
    for model in models:
        run = None if model is None else run_of(Path(model))
        if run is not None:
            learnt |= {run.fingerprint: run.folder} | _ancestors(run)
    return overlaps(prompts, learnt, None)


def overlaps(prompts: Sequence[Record], learnt: Mapping[str, Path], own: float | None) -> list[str]:
    """A line for each run that was trained on some of the prompts.

    Args:
        prompts: What is measured on.
        learnt: Folders of runs, by fingerprint.
        own: The share or number that the stage holds out; None where there is none.
    """
    keys, lines = _keys(prompts), []
    for folder in learnt.values():
        if not len(keys) or not (folder / FILE).is_file():
            continue
        try:
            count = int(np.isin(keys, np.load(folder / FILE)).sum())
        except (OSError, ValueError, EOFError) as error:
            reason = first_line(error)
            lines.append(
                f"warning: {folder / FILE} cannot be read ({reason}), so whether held-out prompts were trained on is "
                "not known"
            )
            continue
        if count:
            node = Run(folder).plain_config.get("data")
            share = node.get("validation") if isinstance(node, Mapping) else None
            mend = "hold out the same prompts there and here: one file, one data.seed, one data.validation"
            if share is not None and own is not None and float(share) != own:
                mend = f"type data.validation={share} here, or data.validation={own:g} there, if both read one file"
            lines.append(
                f"warning: {count} of {len(keys)} held-out prompts were trained on by {folder.parent.name} ({folder}), "
                f"so what is measured on them is too good; {mend}"
            )
    return lines


def _ancestors(run: Run) -> dict[str, Path]:
    known = run.lineage.get("ancestors", {})
    return {key: Path(str(one["folder"])) for key, one in known.items() if one.get("folder")}


def _sources(data: Split) -> list[str]:
    parts = getattr(data.data, "parts", None)
    return [source for part in (parts.values() if parts else [data.data]) for source in part.sources]


def _made_up(data: Split) -> bool:
    return bool({TESTBED, ARITHMETIC} & set(_sources(data)))


def _keys(records: Iterable[Record]) -> Any:
    digests = (hashlib.sha256(asked(record).encode()).digest()[:8] for record in records)
    return np.fromiter((int.from_bytes(digest) for digest in digests), np.uint64)
