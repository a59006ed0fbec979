"""Plain weights and configurations: what is saved of a model with adapters or a quantised base."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf.models.peft_types import is_tuner_layer


def merged_state(base: PreTrainedModel, plain: Callable[[], PreTrainedModel] | None) -> dict[str, Tensor]:
    """Return the state dict of a base with its adapters merged in; the live weights stay bit-identical.

    Args:
        base: The model, with adapters in its layers or without.
        plain: For a quantised base, loads the same weights unquantised.
    """
    tuned = {name: module for name, module in base.named_modules() if is_tuner_layer(module)}
    if plain is not None:
        state = dict(plain().state_dict())
        for name, module in tuned.items():
            weight = state[f"{name}.weight"]
            for adapter in (name for name in module.active_adapters if name in module.lora_A):
                weight = weight + module.get_delta_weight(adapter).to(weight)
            state[f"{name}.weight"] = weight
        return state
    state = {
        name.replace(".base_layer.", "."): value for name, value in base.state_dict().items() if ".lora_" not in name
    }
    for name, module in tuned.items():  # one layer at a time: a copy of the whole model would double the memory
        layer = copy.deepcopy(module)
        layer.merge()
        state[f"{name}.weight"] = layer.get_base_layer().weight.detach()
    return state


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of the configuration without quantisation."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def materialize(kind: Any, config: PreTrainedConfig, state: dict[str, Tensor]) -> PreTrainedModel:
    """Build a model of class ``kind`` around the tensors of ``state``, without copying them.

    Raises:
        KeyError: If the state lacks a weight that is not tied to another, or has an unexpected one.
    """
    with torch.device("meta"):
        model = kind(config)
    result = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, value in model.state_dict().items() if value.is_meta]
    if missing or result.unexpected_keys:
        raise KeyError(f"cannot save {kind.__name__}: missing {missing[:3]}, unexpected {result.unexpected_keys[:3]}")
    return model
