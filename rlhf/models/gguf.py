"""GGUF files as Hugging Face directories: dequantised once, then as fast to load as any other model."""

import hashlib
import io
import shutil
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, redirect_stderr, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.errors import UserError, first_line
from rlhf.models import gguf_source
from rlhf.models.gguf_header import count_tensors
from rlhf.models.load_errors import check_loaded
from rlhf.models.saving import plain_config
from rlhf.storage.cache import cache_folder, mark_used

LAYOUT = "1"  # version of the converted directories; increased when the conversion changes
TOKENIZER = "tokenizer_config.json"


def convert_gguf(source: str) -> str:
    """Return the Hugging Face directory with a GGUF file's float32 weights, tokenizer and chat template.

    The directory is in the cache under the file's digest. The first use creates it (one process converts, others wait);
    it takes 4 bytes per weight. A file without a vocabulary gives a directory without tokenizer.

    Raises:
        UserError: If the file is missing or cannot be read, or the cache cannot be written.
    """
    file = Path(source).expanduser()
    folder, digest = place(source), _digest_now(file)
    if (folder / "config.json").exists():
        if not (folder / gguf_source.SOURCE_FILE).exists():
            with suppress(OSError):  # the cache may be read-only
                gguf_source.write(folder, file, digest)
        mark_used(folder)
        return str(folder)
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not (folder / "config.json").exists():
                print(f"  {file.name}: read and dequantised once, into {folder}", flush=True)
                scratch = folder.with_name(f".{folder.name}.part")
                shutil.rmtree(scratch, ignore_errors=True)
                # torch's modes (fake tensors, a default device) are per thread: a separate thread has none, so the
                # written weights are real whatever mode the caller is in.
                with ThreadPoolExecutor(1) as thread:
                    thread.submit(_convert, file, scratch).result()
                gguf_source.write(scratch, file, digest)
                scratch.rename(folder)
    except PermissionError as error:
        fix = "type RLHF_CACHE=DIRECTORY before the command"
        raise UserError(f"{folder.parent}: cannot be written", fix) from error
    return str(folder)


def place(source: str) -> Path:
    """Return the path of the directory converted from a GGUF file, whether or not it exists yet.

    Raises:
        UserError: If the file is missing.
    """
    file = Path(source).expanduser()
    if not file.is_file():
        raise _error("no such file", source, "type the path of a GGUF file")
    return cache_folder("gguf") / f"{file.stem}-{_digest_now(file)[:16]}-{LAYOUT}"


def _digest_now(file: Path) -> str:
    stat = file.stat()
    return _digest(file, stat.st_size, stat.st_mtime_ns)


@cache
def _digest(file: Path, size: int, changed_ns: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _convert(file: Path, folder: Path) -> None:
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    # Its progress bar cannot be switched off, and it clutters a file or a pipe.
    screen = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    try:
        with screen:
            if not count_tensors(file):  # transformers would build a model of its default sizes
                raise _error("has no weights", file)
            kind: Any = AutoModelForCausalLM
            loaded, report = kind.from_pretrained(
                **place, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
            )
    except ImportError as error:
        raise _error("GGUF files need the Python package gguf", file, "type pip install gguf") from error
    except UserError:
        raise
    except Exception as error:  # the reader unpacks unchecked content, so any type can occur
        raise _error(f"is not a GGUF file that transformers can read ({first_line(error)})", file) from error
    check_loaded(loaded, report, file, "model.path")
    # transformers refuses to save a model loaded from GGUF, so its tensors move into a new model.
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(
            plain_config(loaded.config), dtype=torch.float32, trust_remote_code=False
        )
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(folder)
    try:
        AutoTokenizer.from_pretrained(**place, trust_remote_code=False).save_pretrained(folder)
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError, IndexError):
        (folder / TOKENIZER).unlink(missing_ok=True)  # the file holds weights alone; the user names a tokenizer


def _error(problem: str, source: object, fix: str = "get the file again, or type the path of another one") -> UserError:
    return UserError(problem, fix, "model.path", source)
