"""Check that a step on the CPU fits into this machine's memory; costs nothing for models that clearly fit."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rlhf.errors import UserError, key
from rlhf.models.machine_memory import read_machine_memory
from rlhf.models.saved_config import replace_published
from rlhf.planning.step import Step
from rlhf.planning.step_config import name_in_step
from rlhf.runs.run_directory import Run
from rlhf.storage.files import read_json
from rlhf.storage.plain import Plain

SWITCH = "RLHF_MEMORY_CHECK"  # environment variable; 0 disables the check
CLOSE = 0.25  # share of the memory above which the exact size is computed
SMALL = 2**30  # bytes that every machine has
BYTES = 16  # upper bound per weight: weight, gradient and two moments in float32


def check_memory(steps: Iterable[Step]) -> None:
    """Raise for a step on the CPU whose weights, gradients and optimizer state alone exceed this machine's memory.

    Finished steps, steps on other devices, and models whose shape is not on this machine are skipped.

    Raises:
        UserError: One line with the sizes in GiB.
    """
    if os.environ.get(SWITCH) == "0":
        return
    for step in steps:
        if (step.config.get("trainer") or {}).get("accelerator") != "cpu" or Run(step.folder).finished:
            continue
        roughly = BYTES * rough_parameters(step.config.get("model") or {})
        if roughly < SMALL or roughly < CLOSE * (have := read_machine_memory()):
            continue
        need = trained_bytes(step.config)
        if need > have:
            error = UserError(
                f"weights, gradients and optimizer state need {need / 2**30:.0f} GiB, this machine has "
                f"{have / 2**30:.0f} GiB",
                fix=f"type a smaller {key('model', '...')}, {key('adapter', 'lora')}, {key('precision', 'bf16_true')} "
                f"or {key('optimizer', 'adamw_8bit')} (or {SWITCH}=0 before the command, to try)",
                where=step.name,
            )
            raise name_in_step(error, step.own, step.name)


def rough_parameters(model: Plain) -> float:
    """Return a slight overestimate of a decoder's number of weights from its widths; 0 if its shape is unknown here."""
    model = replace_published(model)
    shape: Any = model.get("architecture")
    path = model.get("path")
    if path is not None:
        files = [Path(str(path)) / "config.json", Path(str(path)) / "model" / "config.json"]
        file = next((file for file in files if file.is_file()), None)
        shape = read_json(file)[0] if file else None
    if not isinstance(shape, dict):
        return 0.0
    try:
        width, layers = float(shape["hidden_size"]), float(shape["num_hidden_layers"])
        inner = float(shape.get("intermediate_size") or 4 * width)
        vocabulary = float(shape.get("vocab_size") or model.get("vocab_size") or 0)
    except (KeyError, TypeError, ValueError):
        return 0.0
    return 2 * vocabulary * width + layers * (4 * width**2 + 3 * width * inner)


def trained_bytes(config: Plain) -> int:
    """Return the bytes of weights, gradients and optimizer state that a step trains, without allocating the model."""
    from hydra.utils import get_object
    from transformers import AutoModelForCausalLM

    from rlhf.importing import build_option
    from rlhf.models.fake_tensors import FakeWeights, cast, quantize, sizes, use_fake_weights
    from rlhf.models.optimizer_state import StateSize
    from rlhf.signatures import groups

    spec = build_option(OmegaConf.create(replace_published(config["model"])))
    adapter, precision = (build_option(OmegaConf.create(config[name])) for name in ("adapter", "precision"))
    with use_fake_weights(FakeWeights()):
        model = AutoModelForCausalLM.from_config(
            spec.config(), dtype=precision.weights, trust_remote_code=spec.trust_remote_code
        )
        quantization_config = adapter.quantization_config(precision)
        if quantization_config is not None:
            quantize(model, quantization_config)
        model = adapter.apply(model)
        cast(model, precision.trainer)
    _, _, weights = sizes(model, set())
    if "optimizer" not in groups(get_object(config["stage"]["_target_"])):
        return weights
    trained = [value for value in model.parameters() if value.requires_grad]
    gradients = sum(value.numel() * value.element_size() for value in trained)
    return weights + gradients + StateSize(build_option(OmegaConf.create(config["optimizer"]))).of(trained)
