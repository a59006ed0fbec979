"""Contamination check: warn of held-out prompts that a model was trained on.

Every run saves the hashes of its training prompts; runs that measure on held-out prompts compare with them. The
held-out part of a file is selected by the hash of the prompt, so stages that read the same file with the same share
hold out the same prompts. With another share, or another file with some of the same prompts, they do not. The testbed
splits its questions itself. No torch here.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.data.data import Data
from rlhf.data.mixture import Mixture
from rlhf.data.records import Record, Text, prompt_text
from rlhf.data.sources import ARITHMETIC, TESTBED
from rlhf.data.split import Split
from rlhf.errors import first_line
from rlhf.runs.run_directory import Run, run_of

FILE = "trained_on.npy"  # in a run directory: 64 bits of the hash of each prompt of its training records, sorted


def save_prompt_hashes(folder: Path, data: Any) -> None:
    """Save the hashes of a run's training prompts; skip the testbed, and texts, which have no prompts."""
    if isinstance(data, Split) and not _is_synthetic(data) and data.train and not isinstance(data.train[0], Text):
        keys = np.unique(_keys(data.train))
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f".{FILE}").open("wb") as file:
            np.save(file, keys)
        (folder / f".{FILE}").replace(folder / FILE)


def check_stage(folder: Path, data: Any) -> list[str]:
    """Return warnings for the held-out prompts of a run that begins: one for each ancestor trained on them.

    Comparisons made by a run are not checked: they use training prompts by design.
    """
    if not isinstance(data, Split) or _is_synthetic(data) or any(run_of(Path(source)) for source in _sources(data)):
        return []
    held_out = [record for record in data.validation if not isinstance(record, Text)]
    return overlap_warnings(
        held_out, _ancestors(Run(folder)), data.data.validation if isinstance(data.data, Data) else None
    )


def check_models(
    prompts: Sequence[Record], models: Iterable[Path | str | None], name: str = "held-out prompts", fix: str = ""
) -> list[str]:
    """Return warnings for evaluation prompts: one for each run, of the models or their ancestors, trained on them.

    Args:
        prompts: Records that the measurement uses.
        models: Models that are measured.
        name: Name of the prompts in the warnings.
        fix: What to type instead; "": the overrides that hold out the same prompts.
    """
    trained: dict[str, Path] = {}
    for model in models:
        run = None if model is None else run_of(Path(model))
        if run is not None:
            trained |= {run.fingerprint: run.folder} | _ancestors(run)
    return overlap_warnings(prompts, trained, None, name, fix)


def overlap_warnings(
    prompts: Sequence[Record],
    trained: Mapping[str, Path],
    own: float | None,
    name: str = "held-out prompts",
    fix: str = "",
) -> list[str]:
    """Return one warning for each run that was trained on some of the prompts.

    Args:
        prompts: Records that the measurement uses.
        trained: Run directories by fingerprint.
        own: Share or number of records that the stage holds out; None if there is none.
        name: Name of the prompts in the warnings.
        fix: What to type instead; "": the overrides that hold out the same prompts.
    """
    keys, lines = _keys(prompts), []
    for folder in trained.values():
        if not len(keys) or not (folder / FILE).is_file():
            continue
        try:
            count = int(np.isin(keys, np.load(folder / FILE)).sum())
        except (OSError, ValueError, EOFError) as error:
            reason = first_line(error)
            lines.append(
                f"warning: {folder / FILE} cannot be read ({reason}), so it is unknown whether {name} were trained on"
            )
            continue
        if count:
            node = Run(folder).plain_config.get("data")
            share = node.get("validation") if isinstance(node, Mapping) else None
            same = "hold out the same prompts there and here: one file, one data.seed, one data.validation"
            if share is not None and own is not None and float(share) != own:
                same = f"type data.validation={share} here, or data.validation={own:g} there, if both read one file"
            lines.append(
                f"warning: {count} of {len(keys)} {name} were trained on by {folder.parent.name} ({folder}), "
                f"so metrics on them are too optimistic; {fix or same}"
            )
    return lines


def _ancestors(run: Run) -> dict[str, Path]:
    known = run.lineage.get("ancestors", {})
    return {key: Path(str(one["folder"])) for key, one in known.items() if one.get("folder")}


def _sources(data: Split) -> list[str]:
    parts = data.data.parts.values() if isinstance(data.data, Mixture) else [data.data]
    return [source for part in parts if isinstance(part, Data) for source in part.sources]


def _is_synthetic(data: Split) -> bool:
    return bool({TESTBED, ARITHMETIC} & set(_sources(data)))


def _keys(records: Iterable[Record]) -> Any:
    digests = (hashlib.sha256(prompt_text(record).encode()).digest()[:8] for record in records)
    return np.fromiter((int.from_bytes(digest) for digest in digests), np.uint64)
