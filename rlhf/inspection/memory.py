"""Memory other than weights: activations of a training pass, the cache of a rollout, and the machine's memory."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rlhf.inspection.composing import Look
from rlhf.inspection.work import Work
from rlhf.models.language_model import LanguageModel
from rlhf.models.machine_memory import read_machine_memory
from rlhf.models.module_state import evaluating
from rlhf.models.precision import Precision
from rlhf.models.scalar import ScalarModel
from rlhf.stage.base import Stage


def activations(look: Look, stage: Stage, work: Work, precision: Precision) -> int | None:
    """Return the bytes that the backward pass of the largest micro-batch needs of the decoders' forward passes.

    Measured in a forward pass on fake tensors: every tensor that autograd would keep, except weights. With gradient
    checkpointing that is every layer's input and the inside of one layer. None if it cannot be measured.
    """
    if not work.rows or stage._optimizer is None:
        return None
    total = 0
    try:
        for model in _trained(stage):
            total += kept_for_backward(look, model, work.rows, work.length, precision)
    except Exception:  # an architecture that reads values, which fake tensors do not have
        return None
    return total


def kept_for_backward(look: Look, model: LanguageModel, rows: int, length: int, precision: Precision) -> int:
    """Return the bytes that autograd keeps of a decoder's forward pass on ``rows`` x ``length`` tokens, not weights."""
    own = {value.untyped_storage()._cdata for value in [*model.parameters(), *model.buffers()]}
    kept: dict[int, tuple[Any, int]] = {}  # keeps the storage alive, or its address would be reused

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        kept[storage._cdata] = (storage, storage.nbytes())
        return value

    checkpointing = any(getattr(part, "gradient_checkpointing", False) for part in model.base.modules())
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value)
    with look.weights.mode, precision.autocast("cpu"), evaluating(model), hooks:  # eval mode disables recomputation
        ids = torch.zeros(rows, length, dtype=torch.long)
        model.base.get_decoder()(input_ids=ids, use_cache=False)
    total = sum(size for address, (_, size) in kept.items() if address not in own)
    if checkpointing:
        layers = int(model.config.num_hidden_layers)
        inputs = layers * rows * length * model.hidden_size * precision.compute.itemsize
        return inputs + total // layers
    return total


def cache(stage: Stage, work: Work, precision: Precision) -> int | None:
    """Return the bytes of keys and values of the largest sampling batch at full length; None without sampling."""
    sampler = getattr(stage, "sampler", None)
    if sampler is None or stage.policy is None:
        return None
    config = stage.policy.config
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    rows = min(max(1, sampler.batch_size // sampler.samples), stage.batch_size) * sampler.samples
    tokens = work.prompt_length + sampler.room(stage.policy)
    return 2 * int(config.num_hidden_layers) * heads * width * precision.compute.itemsize * rows * tokens


def machine(accelerator: str) -> tuple[int | None, str]:
    """Return (bytes of memory that training may use, name of the device); None for a device that is absent."""
    if accelerator == "cpu":
        return read_machine_memory(), "this machine"
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0)
    return None, "no GPU on this machine"


def _trained(stage: Stage) -> Iterator[LanguageModel]:
    for module in stage.modules_trained():
        model: nn.Module = module.language_model if isinstance(module, ScalarModel) else module
        if isinstance(model, LanguageModel):
            yield model


def size(count: int | None) -> str:
    """Return a number of bytes with a binary unit; "-" for 0, "?" for None."""
    if count is None:
        return "?"
    if not count:
        return "-"
    value, units = float(count), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while value >= 1024 and unit != "GiB":
        value, unit = value / 1024, next(units)
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"
