"""Settings of Lightning's Trainer that stages support: strategies and loop arguments. No torch here."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

#: Strategies that keep whole weights on every rank, by name or by class.
WHOLE = re.compile(r"auto|single_device|ddp(_\w+)?|(.*\.)?(DDP|SingleDevice)Strategy")

#: Arguments of Lightning's own optimizer loop -> (the config key to use instead, the value without effect).
INSTEAD = {"gradient_clip_val": ("stage.gradient_clip", 0), "accumulate_grad_batches": ("stage.micro_batch_size", 1)}


def problems(trainer: Mapping[str, Any]) -> Iterator[str]:
    """Yield the problems of a trainer's config, without the name of the step that it belongs to."""
    strategy = trainer.get("strategy", "auto")
    name = strategy.get("_target_") if isinstance(strategy, Mapping) else strategy
    if isinstance(name, str) and not WHOLE.fullmatch(name):
        yield sharded(name)
    for key, (instead, nothing) in INSTEAD.items():
        if trainer.get(key) not in (None, nothing):
            yield f"trainer.{key}={trainer[key]}: a stage clips and accumulates gradients itself; type {instead}=..."


def sharded(strategy: str) -> str:
    """Return the message for a strategy that shards weights, gradients or optimizer states over ranks."""
    return (
        f"trainer.strategy={strategy}: weights that are cut up over processes cannot be trained yet (the norm of the "
        "gradient would be each process's own), and a stage knows ddp and single devices alone; type trainer=ddp"
    )
