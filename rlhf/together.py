"""What the parts of a step's config must be for each other, as far as it can be told before anything is loaded.

A stage class may have a static method ``check_config(config)``: it gets the resolved config of its step as plain
containers, and raises UserError with keys written as in a single run (``stage.batch_size``). No torch here.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

from rlhf.errors import UserError

Config = Mapping[str, Any]


def placed(message: str, config: Config, prefix: str) -> str:
    """A message with its keys as they are typed for the step that ``prefix`` ("align.") names."""
    if not prefix:
        return message
    heads = "|".join(re.escape(str(key)) for key in config)
    return re.sub(rf"(?<![\w./@-])(?=(?:{heads})\.[a-z_])", prefix, message)


def built(config: Config, group: str) -> Any:
    """The object of a group that costs nothing to build: an objective, a sampler."""
    return instantiate(OmegaConf.create(dict(config[group])), _convert_="all")


def check_minibatches(config: Config) -> None:
    """Refuses a batch that does not fall into equal minibatches."""
    batch_size, minibatches = config["stage"]["batch_size"], config["stage"]["minibatches"]
    if batch_size % minibatches:
        raise UserError(
            f"stage.batch_size={batch_size} is not a multiple of stage.minibatches={minibatches}: "
            f"type stage.batch_size={-(-batch_size // minibatches) * minibatches}"
        )


def check_text(config: Config) -> None:
    """Refuses a pretraining term without text."""
    objective = config.get("objective") or {}
    if objective.get("gamma") and config.get("text") is None:
        raise UserError("objective.gamma > 0 needs pretraining text: type text=text, or objective.gamma=0")


def check_vocabulary(config: Config, path: object, what: str, instead: str) -> None:
    """Refuses a model that cannot read the policy's tokens, where both are folders that can be looked into by now.

    Compared are the words of the two tokenizers; tokens that a chat template adds are left to the loaded models.
    """
    model = config.get("model") or {}
    if model.get("tokenizer") is not None or not isinstance(path, str):
        return
    ours, theirs = words(model.get("path")), words(path)
    if ours is not None and theirs is not None and ours != theirs:
        shared = sum(theirs.get(word) == number for word, number in ours.items())
        raise UserError(
            f"{what}={path} has another vocabulary than the policy ({len(theirs)} tokens against {len(ours)}, {shared} "
            f"the same), so it cannot read the policy's tokens: type {instead}"
        )


def words(path: object) -> dict[str, int] | None:
    """Word -> id of the tokenizer of a model or run folder, without added tokens; None where there is none to read."""
    for folder in (Path(str(path)), Path(str(path)) / "model"):
        file = folder / "tokenizer.json"
        if path is not None and file.is_file():
            try:
                vocabulary = json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"]
            except (ValueError, KeyError, TypeError):
                return None
            if isinstance(vocabulary, dict):
                return vocabulary
            return {str(item[0]): index for index, item in enumerate(vocabulary)}
    return None
