"""What the config.json in a model folder says, before anything is loaded. No torch here."""

import json
from pathlib import Path
from typing import Any

from rlhf.errors import UserError


def file_of(path: object, name: str) -> Path | None:
    """A file of the model in a model or run folder; None where there is none."""
    folders = (Path(str(path)), Path(str(path)) / "model")
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def written(path: object) -> dict[str, Any] | None:
    """The configuration in a model or run folder; None where there is none to read (a hub id, a run yet to be made)."""
    file = file_of(path, "config.json")
    if file is None:
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def scores(path: object) -> bool | None:
    """Whether a folder holds a reward or value model, by the architecture it names; None where nothing says."""
    names = (written(path) or {}).get("architectures")
    return any(str(name).endswith("ForSequenceClassification") for name in names) if names else None


def no_head(key: str, path: object, instead: str = "inputs.reward_model=RUN, one of stage=reward_model") -> UserError:
    """What is said of a language model where one that scores is asked for: its head would be drawn by chance."""
    return UserError(f"{key}={path}: a language model, without a head that scores replies; type {instead}")
