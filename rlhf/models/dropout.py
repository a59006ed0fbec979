"""Dropout: disable every dropout of a model, and measure whether passes still vary."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig

#: Attributes that hold a rate of dropout (hidden_dropout, resid_pdrop, layerdrop, drop_path) or of a router's noise.
RATE = re.compile(r"drop|jitter_noise")
#: Number of passes compared if a model draws random numbers: layer dropout may keep all layers in the first two passes.
PASSES = 16


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0: dropout modules, and numeric rates in its modules and their configs.

    OPT, Bloom, Falcon and others have no dropout module: they call ``F.dropout`` with a number stored as an attribute.
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        _clear(vars(module))


def _clear(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, float) and RATE.search(name):
            values[name] = 0.0
        elif isinstance(value, PreTrainedConfig):
            _clear(vars(value))
        elif name.endswith("config") and isinstance(value, dict):
            _clear(value)


@torch.no_grad()
def variation(run: Callable[[], Tensor]) -> float:
    """Return how far repeated calls of ``run`` differ: the largest difference over the largest value; 0 if they agree.

    The caller's random state is restored.
    """
    with torch.random.fork_rng():
        before = _states()
        first = run().float()
        draws = any(not torch.equal(a, b) for a, b in zip(before, _states(), strict=True))
        others = [run().float() for _ in range(PASSES - 1 if draws else 1)]
    return max((first - other).abs().max().item() for other in others) / max(first.abs().max().item(), 1e-30)


def _states() -> list[Tensor]:
    """Return the states of all random number generators that a model may draw from."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]
