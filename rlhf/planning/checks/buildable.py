"""Check that transformers and Lightning can build the model and the Trainer of a step's config.

The model is built with one layer and a tiny vocabulary and reads two tokens: sizes that do not fit together raise as
they would in training. This module imports no torch at module level.
"""

import json
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from rlhf.errors import UserError, first_line, key
from rlhf.models import lineage
from rlhf.models.saved_config import check_file_limits, check_limits, find_file, read_config

# Keys of config.json that are left out when a decoder of one layer is built.
_NOT_ITS_SHAPE = ("architectures", "bos_token_id", "eos_token_id", "layer_types", "pad_token_id", "quantization_config")
SMALL = 2048  # hidden size up to which one layer is built with weights; above it, without


def check(step: Any, earlier: Any = ()) -> None:
    """Raise for a step whose model or Trainer cannot be built.

    Raises:
        UserError: one line that names the key.
    """
    _check_model(step.config.get("model"))
    _check_trainer(step.config.get("trainer"))


def _check_model(model: Any) -> None:
    if not isinstance(model, dict) or model.get("_target_") != "rlhf.models.causal_lm.CausalLM":
        return
    own = model.get("architecture")
    if model.get("path") is None and isinstance(own, dict):
        check_limits(own, "model.architecture")
        # The tokenizer is trained on the data and may be smaller than configured; any size shows a misfit.
        problem = _problem(json.dumps(own, sort_keys=True, default=str), run=True)
        if problem:
            option = "model.architecture"
            raise UserError(f"transformers cannot build it ({problem})", fix="change its sizes", option=option)
    elif model.get("path") is not None:
        _check_folder(model["path"])


def _check_folder(path: Any) -> None:
    file, shape = find_file(path, "config.json"), read_config(path)
    if (adapter := find_file(path, "adapter_config.json")) is not None:
        lineage.stored_config(adapter.parent)
    if file is None:  # a model of the hub, or of a run that has not been made yet
        return
    if shape is None:
        raise UserError(f"{file} is not a JSON object", fix="get the model again", option="model.path", value=path)
    check_file_limits(shape, path, "model.path")
    if not isinstance(shape.get("text_config"), dict) and "auto_map" not in shape and "model_type" in shape:
        problem = _problem(json.dumps(shape, sort_keys=True), run=False)
        if problem:
            problem = f"transformers cannot build the model of its config.json ({problem})"
            raise UserError(problem, fix="get the model again", option="model.path", value=path)


@cache
def _problem(shape: str, run: bool) -> str | None:
    """Return the result of `_tried`, with the log output of transformers silenced."""
    from rlhf.models.load_errors import defer_transformers_log

    with defer_transformers_log(trial=True):
        return _tried(shape, run)


def _tried(shape: str, run: bool) -> str | None:
    """Return why a decoder of this shape (JSON) cannot be built, or run on two tokens; None if nothing is wrong.

    Families that transformers does not know are not tried.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    arguments = {name: value for name, value in json.loads(shape).items() if name not in _NOT_ITS_SHAPE}
    family = arguments.pop("model_type", "llama")
    if not isinstance(family, str):
        return f"model_type is {family}, not a string"
    if family not in CONFIG_MAPPING:
        return None  # remote code; an architecture typed by hand is checked where it is read
    try:
        # The final vocabulary may be smaller than configured; any size shows a misfit.
        config = CONFIG_MAPPING[family](**{**arguments, "num_hidden_layers": 1, "vocab_size": 64})
        small = run and getattr(config, "hidden_size", SMALL + 1) <= SMALL
        with torch.device("cpu" if small else "meta"), torch.no_grad(), torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            if small:  # not on the meta device: transformers reads values, and meta tensors have none
                model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    except Exception as error:  # any exception type: transformers passes on those of its layers
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[-1] if lines else type(error).__name__
    return None


def _check_trainer(trainer: Any) -> None:
    """Build the Trainer, because Lightning then checks accelerators, numbers of devices and limits."""
    if not isinstance(trainer, dict) or trainer.get("_target_") != "pytorch_lightning.Trainer":
        return
    devices = trainer.get("devices", 1)
    if devices != "auto" and not isinstance(devices, list) and not (type(devices) is int and devices >= 1):
        fix = f"type {key('trainer.devices', 1)}"
        raise UserError("must be a whole number from 1, or auto", fix=fix, option="trainer.devices", value=devices)
    problem = _trainer_problem(json.dumps(trainer, sort_keys=True, default=str))
    if problem:
        fix = f"change the keys below {key('trainer')}"
        raise UserError(f"Lightning cannot build it ({problem})", fix=fix, option="trainer")


@cache
def _trainer_problem(node: str) -> str | None:
    """Return the first line of Lightning's error for a Trainer (JSON); None if it can be built."""
    import hydra.utils

    from rlhf.console import silence_libraries

    silence_libraries()
    try:
        hydra.utils.instantiate(OmegaConf.create({**json.loads(node), "logger": False, "enable_checkpointing": False}))
    except Exception as error:  # Hydra's InstantiationException around any error of Lightning
        return first_line(error.__cause__ or error)
    return None
