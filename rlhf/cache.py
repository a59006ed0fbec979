"""Cache of what can be made again: models read from GGUF files, streams on their way to training, digests of code."""

import os
from contextlib import suppress
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


def recall(name: str, key: str) -> str | None:
    """Return the text kept under a key in a folder of the cache; None if there is none or the cache cannot be read."""
    with suppress(OSError, UnicodeDecodeError, UserError):
        return (cache_folder(name) / key).read_text(encoding="utf-8")
    return None


def remember(name: str, key: str, text: str) -> None:
    """Keep a text, whole or not at all; does nothing where the cache cannot be written."""
    with suppress(OSError, UserError):
        file = cache_folder(name) / key
        scratch = file.with_name(f".{key}.{os.getpid()}")
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, file)
