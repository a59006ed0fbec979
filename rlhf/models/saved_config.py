"""Content of a model directory's config.json, read before anything is loaded. No torch here."""

from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.runs import run_files
from rlhf.storage.files import read_json
from rlhf.storage.plain import Plain

# The largest published models have at most a quarter of this; more is a typo or a file meant to exhaust the machine.
LIMITS = {
    "num_hidden_layers": 1024,
    "n_layer": 1024,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "max_position_embeddings": 2**27,
    "vocab_size": 2**23,
}


def check_limits(shape: Plain, name: str) -> None:
    """Raise UserError for sizes that no model has; ``name`` precedes the key in the message."""
    for key, most in LIMITS.items():
        value = shape.get(key)
        for one in value if isinstance(value, list) else () if value is None else (value,):  # a list: one per layer
            if type(one) is not int or not 1 <= one <= most:
                raise UserError(f"{name}{key}={one}: should be a whole number from 1 to {most}")


def check_file_limits(shape: Plain, name: str) -> None:
    """Raise UserError for sizes in a config.json that no model has; ``name`` is the model's name in the message."""
    check_limits(shape, f"{name}: config.json has ")
    if isinstance(shape.get("text_config"), dict):
        check_limits(shape["text_config"], f"{name}: config.json has text_config.")


def find_file(path: object, name: str) -> Path | None:
    """Return the path of a model's file in a model or run directory; None if the file does not exist."""
    folders = (Path(str(path)), Path(str(path)) / "model")
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def read_config(path: object) -> dict[str, Any] | None:
    """Return the content of config.json in a model or run directory.

    None if it cannot be read, as for a hub id or a run that does not exist yet.
    """
    file = find_file(path, "config.json")
    if file is None:
        return None
    found, _ = read_json(file)
    return found if isinstance(found, dict) else None


def is_scalar_model(path: object) -> bool | None:
    """Return whether a directory holds a reward or value model, by the architecture in its config; None if unknown."""
    names = (read_config(path) or {}).get("architectures")
    if not isinstance(names, list) or not names:
        return None
    return any(str(name).endswith("ForSequenceClassification") for name in names)


def score_scale(folder: Path) -> dict[str, float] | None:
    """Return scale, bias and log_odds of a stored reward model's scores; None if its directory has no rlhf.json.

    Raises:
        UserError: If the file is damaged.
    """
    file = folder / "rlhf.json"
    if not file.is_file():
        return None
    fields = {"scale": run_files.finite, "bias": run_files.finite, "log_odds": run_files.optional(run_files.finite)}
    found = run_files.required(file, fields, "make the reward model again, or copy its folder anew")
    return {"scale": found["scale"], "bias": found["bias"], "log_odds": found["log_odds"] or 1.0}


def missing_head_error(
    key: str, path: object, instead: str = "inputs.reward_model=RUN, one of stage=reward_model"
) -> UserError:
    """Return the error for a language model where a scoring model is required: its head would be random."""
    return UserError(f"{key}={path}: a language model, without a head that scores responses; type {instead}")
