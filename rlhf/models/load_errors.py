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
from rlhf.models.saved_config import model_error
from rlhf.storage.files import read_json

MODEL = "type the path of a model directory or run directory, or a hub id"


@contextmanager
def convert_read_errors(path: object, fix: str = MODEL, option: str = "", part: str = "") -> Iterator[None]:
    """Convert any exception that a reader of stored files raises inside the context into a UserError.

    Readers of safetensors, pickles, JSON and tokenizers raise exceptions of many types. An adapter whose weights belong
    to other layers, which PEFT would initialise afresh, is also an error.

    Args:
        path: Model or file being read, as typed or by path.
        fix: Instruction for the user.
        option: Config key whose value is ``path``, if any.
        part: Part of the model that is read, with its name; "" for the model itself.
    """
    try:
        with defer_transformers_log(), warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # the file is then rejected anyway
            yield
    except (RLHFError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        problem = f"cannot be read ({_reason(error)})"
        raise model_error(path, f"{part} {problem}" if part else problem, fix, option) from error


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


def check_loaded(model: PreTrainedModel, report: Mapping[str, Collection[str]], path: object, option: str = "") -> None:
    """Raise if a model has weights that its files lack, or its files have layers that the model lacks.

    Args:
        model: The model as loaded.
        report: Loading report of transformers: names of weights under `missing_keys` and `unexpected_keys`.
        path: The model, as typed.
        option: Config key whose value is ``path``, if any.

    Raises:
        UserError: If weights are missing, the files hold layers that config.json does not describe, or an
            ``eos_token_id`` of the generation config is not an integer.
    """
    missing = sorted(report["missing_keys"])
    if missing:
        problem = f"{len(missing)} weights are missing, such as {', '.join(missing[:3])}"
        raise model_error(path, problem, "get the model again", option)
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and type(end) is not int:  # else it would fail only when the trained model is saved
            problem = f"generation_config.json has eos_token_id={ends!r}, which is not a token id"
            raise model_error(path, problem, "set it to the id of the EOS token", option)
    kinds = {_kind(name, model) for name in model.state_dict()}
    # Unexpected weights of other kinds belong to other heads, towers or old buffers.
    more = sorted(name for name in report["unexpected_keys"] if _kind(name, model) in kinds)
    if more:
        problem = f"its weights have layers that config.json does not describe, such as {more[0]}"
        raise model_error(path, problem, "restore the config.json that belongs to the weights", option)


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
                raise UserError(
                    f"{file}: names {name}, which is not inside the model's directory", fix="get the model again"
                )


def _kind(name: str, model: PreTrainedModel) -> str:
    """Return the name of a weight without layer numbers and without the prefix that some checkpoints lack."""
    return re.sub(r"\.\d+(?=\.)", ".N", name.removeprefix(f"{model.base_model_prefix}."))


def _reason(error: Any) -> str:
    """Return the message of a reader's exception in one line.

    Its text is searched because transformers, PEFT and safetensors raise general classes such as RuntimeError.
    """
    text = str(error).strip()
    if "ignore_mismatched_sizes" in text:
        return "its weights have other shapes than config.json describes"
    if isinstance(error, pickle.UnpicklingError):
        return "its weights are a pickle of other objects than tensors"
    if text.startswith("Found missing adapter keys"):
        return "its adapter was trained on other layers than this base has"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = lines[0] if lines else ""
    if reason.endswith(":") and len(lines) > 1:  # a heading; the reason is on the next line
        reason = f"{reason} {lines[1]}"
    return reason if isinstance(error, OSError | ValueError) and reason else f"{type(error).__name__}: {reason}"
