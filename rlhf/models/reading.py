"""Say in one line what is wrong with the files of stored models, which libraries read."""

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
from rlhf.files import read_json

MODEL = "give a model folder, a run folder or a hub id"


@contextmanager
def readable(name: str, fix: str = MODEL) -> Iterator[None]:
    """Context manager: what a reader of stored files raises becomes a UserError.

    Readers of safetensors, pickles, JSON and tokenizers raise what they like. An adapter that PEFT would start anew,
    since its weights are those of other layers, cannot be read either.

    Args:
        name: What is read, as it was typed or where it lies.
        fix: What to do, the end of the message.
    """
    try:
        with quiet_if_refused(), warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # of a file that is then refused
            yield
    except (RLHFError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"{name}: cannot be read ({_reason(error)}); {fix}") from error


@contextmanager
def quiet_if_refused(trial: bool = False) -> Iterator[None]:
    """Context manager: what transformers logs is printed at the end, and not at all where an error is raised.

    With CI=true in the environment, transformers hands what it logs to the root logger as well.

    Args:
        trial: Print nothing in any case, since what is built is thrown away.
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
    """Refuse a model some of whose weights would be made up, or some of whose layers would be left out.

    Args:
        model: As it was read.
        report: Of transformers: names of weights under `missing_keys` and `unexpected_keys`.
        name: The model, as it was typed.

    Raises:
        UserError: Weights are missing, the files hold layers that config.json does not ask for, or generation stops at
            what is no token.
    """
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"{name}: {len(missing)} weights are not there, such as {', '.join(missing[:3])}")
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and type(end) is not int:  # it would be found when the trained model is saved
            raise UserError(f"{name}: generation_config.json has eos_token_id={ends!r}, not the number of a token")
    kinds = {_kind(key, model) for key in model.state_dict()}
    # Other weights that are left over belong to other heads, towers or old buffers.
    more = sorted(key for key in report["unexpected_keys"] if _kind(key, model) in kinds)
    if more:
        raise UserError(
            f"{name}: its weights hold layers that config.json does not ask for, such as {more[0]}; put back the "
            "config.json that belongs to them"
        )


def check_index(source: str) -> None:
    """Refuse a model folder whose index of weights names files outside it, which transformers would read.

    Args:
        source: A folder; anything else (a hub id) passes.

    Raises:
        UserError: One line that names the file.
    """
    for file in sorted(Path(source).glob("*.index.json")):
        content, _ = read_json(file)
        names = content.get("weight_map") if isinstance(content, dict) else None
        for name in names.values() if isinstance(names, dict) else ():
            if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"{file}: names {name}, which is not inside the model's folder; get the model again")


def _kind(key: str, model: PreTrainedModel) -> str:
    """Return the name of a weight without its layer's numbers and the prefix that some checkpoints lack."""
    return re.sub(r"\.\d+(?=\.)", ".N", key.removeprefix(f"{model.base_model_prefix}."))


def _reason(error: Any) -> str:
    """Return what a reader of a model's files says, in one line."""
    text = str(error).strip()
    if "ignore_mismatched_sizes" in text:
        return "its weights have other shapes than config.json says"
    if isinstance(error, pickle.UnpicklingError):
        return "its weights are a pickle of something else than tensors"
    if text.startswith("Found missing adapter keys"):
        return "its adapter is for other layers than this base has"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = lines[0] if lines else ""
    if said.endswith(":") and len(lines) > 1:  # a heading, and the reason below it
        said = f"{said} {lines[1]}"
    return said if isinstance(error, OSError | ValueError) and said else f"{type(error).__name__}: {said}"
