"""Errors of libraries that read stored models, converted into one-line messages."""

import logging
import pickle
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf.errors import RLHFError, UserError
from rlhf.storage.files import read_json

MODEL = "give a model folder, a run directory or a hub id"


@contextmanager
def convert_read_errors(name: str, fix: str = MODEL) -> Iterator[None]:
    """Convert any exception that a reader of stored files raises inside the context into a UserError.

    Readers of safetensors, pickles, JSON and tokenizers raise exceptions of many types. An adapter whose weights belong
    to other layers, which PEFT would initialise afresh, is also an error.

    Args:
        name: Model or file being read, as typed or by path.
        fix: Instruction for the user, the end of the message.
    """
    try:
        with defer_transformers_log(), warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # the file is then rejected anyway
            yield
    except (RLHFError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"{name}: cannot be read ({_reason(error)}); {fix}") from error


@contextmanager
def defer_transformers_log(trial: bool = False) -> Iterator[None]:
    """Delay the log of transformers until the context ends; drop it if an exception is raised.

    With CI=true in the environment, transformers also passes its log to the root logger.

    Args:
        trial: Print nothing in any case, since the built model is discarded.
    """
    logger = logging.getLogger("transformers")
    handlers, propagate = logger.handlers, logger.propagate
    kept = MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL + 1)
    logger.handlers, logger.propagate = [kept], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
    for record in kept.buffer if not trial else ():
        logger.handle(record)


def check_loaded(model: PreTrainedModel, report: Mapping[str, Collection[str]], name: str) -> None:
    """Raise if a model has weights that its files lack, or its files have layers that the model lacks.

    Args:
        model: The model as loaded.
        report: Loading report of transformers: names of weights under `missing_keys` and `unexpected_keys`.
        name: The model, as typed.

    Raises:
        UserError: If weights are missing, the files hold layers that config.json does not describe, or an
            ``eos_token_id`` of the generation config is not an integer.
    """
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"{name}: {len(missing)} weights are not there, such as {', '.join(missing[:3])}")
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and type(end) is not int:  # else it would fail only when the trained model is saved
            raise UserError(f"{name}: generation_config.json has eos_token_id={ends!r}, not the number of a token")
    kinds = {_kind(key, model) for key in model.state_dict()}
    # Unexpected weights of other kinds belong to other heads, towers or old buffers.
    more = sorted(key for key in report["unexpected_keys"] if _kind(key, model) in kinds)
    if more:
        raise UserError(
            f"{name}: its weights hold layers that config.json does not ask for, such as {more[0]}; put back the "
            "config.json that belongs to them"
        )


def check_index(source: str) -> None:
    """Raise if the weight index of a model directory names files outside it, which transformers would read.

    Args:
        source: A directory; anything else (a hub id) passes.

    Raises:
        UserError: One line that names the index file and the outside file.
    """
    for file in sorted(Path(source).glob("*.index.json")):
        content, _ = read_json(file)
        names = content.get("weight_map") if isinstance(content, dict) else None
        for name in names.values() if isinstance(names, dict) else ():
            if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"{file}: names {name}, which is not inside the model's folder; get the model again")


def _kind(key: str, model: PreTrainedModel) -> str:
    """Return the name of a weight without layer numbers and without the prefix that some checkpoints lack."""
    return re.sub(r"\.\d+(?=\.)", ".N", key.removeprefix(f"{model.base_model_prefix}."))


def _reason(error: Any) -> str:
    """Return the message of a reader's exception in one line."""
    text = str(error).strip()
    if "ignore_mismatched_sizes" in text:
        return "its weights have other shapes than config.json says"
    if isinstance(error, pickle.UnpicklingError):
        return "its weights are a pickle of something else than tensors"
    if text.startswith("Found missing adapter keys"):
        return "its adapter is for other layers than this base has"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = lines[0] if lines else ""
    if said.endswith(":") and len(lines) > 1:  # a heading; the reason is on the next line
        said = f"{said} {lines[1]}"
    return said if isinstance(error, OSError | ValueError) and said else f"{type(error).__name__}: {said}"
