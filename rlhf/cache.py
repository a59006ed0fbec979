"""Where what can be made again is kept: models read from GGUF files, streams on their way to training."""

import os
from pathlib import Path

from rlhf.errors import UserError


def cache_folder(name: str) -> Path:
    """A folder of the cache, made if need be: in RLHF_CACHE, else in rlhf in XDG_CACHE_HOME, else in ~/.cache/rlhf."""
    own = os.environ.get("RLHF_CACHE")
    home = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "rlhf"
    folder = home.expanduser() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made ({error.strerror}); type RLHF_CACHE=FOLDER before the command"
        ) from error
    return folder
