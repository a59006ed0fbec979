"""Content of a model directory's config.json, read before anything is loaded. No torch here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.errors import UserError, key
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


def check_limits(shape: Plain, option: str) -> None:
    """Raise UserError for sizes that no model has; ``option`` is the config key that holds them."""
    for name, value, most in _impossible_sizes(shape):
        raise UserError(f"should be a whole number from 1 to {most}", option=f"{option}.{name}", value=value)


def check_file_limits(shape: Plain, path: object, option: str = "") -> None:
    """Raise UserError for sizes in a config.json that no model has.

    Args:
        shape: Content of the file.
        path: Model, as typed.
        option: Config key whose value is ``path``, if any.
    """
    inner = shape.get("text_config")
    for prefix, sizes in (("", shape), ("text_config.", inner if isinstance(inner, dict) else {})):
        for name, value, most in _impossible_sizes(sizes):
            problem = f"config.json has {prefix}{name}={value}, which should be a whole number from 1 to {most}"
            raise model_error(path, problem, "get the model again", option)


def _impossible_sizes(shape: Plain) -> Iterator[tuple[str, Any, int]]:
    """Yield (name, value, maximum) of the sizes that no model has."""
    for name, most in LIMITS.items():
        value = shape.get(name)
        for one in value if isinstance(value, list) else () if value is None else (value,):  # a list: one per layer
            if type(one) is not int or not 1 <= one <= most:
                yield name, one, most


def model_error(path: object, problem: str, fix: str, option: str = "") -> UserError:
    """Return an error about a stored model.

    Args:
        path: Model or file, as typed or by path.
        problem: What is wrong with it.
        fix: Instruction for the user.
        option: Config key whose value is ``path``; without one, the message starts with the path.
    """
    return UserError(problem, fix, option, path) if option else UserError(f"{path}: {problem}", fix)


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


def replace_published(model: Plain) -> Plain:
    """Return the ``model`` group without its path if its architecture describes the weights at this path.

    So that their sizes and layers are known before they are downloaded; see ``hub_id`` of ``ModelSource``.
    """
    published = model.get("path") is not None and model["path"] == model.get("hub_id") and model.get("architecture")
    return {**model, "path": None} if published else model


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
    found = run_files.required(file, fields, "train the reward model again, or copy its directory again")
    return {"scale": found["scale"], "bias": found["bias"], "log_odds": found["log_odds"] or 1.0}


def missing_head_error(
    option: str,
    path: object,
    fix: str = f"type {key('inputs.reward_model', 'RUN')}, where RUN is a run of stage=reward_model",
) -> UserError:
    """Return the error for a language model where a scoring model is required: its head would be random."""
    return UserError("is a language model, which has no score head", fix, option, path)


def output_count_error(path: object, count: int) -> UserError:
    """Return the error for a sequence classifier with several outputs where a reward model is required."""
    return UserError(
        f"has {count} outputs, and a reward model must have 1",
        fix="type a run of stage=reward_model",
        option="model.path",
        value=path,
    )
