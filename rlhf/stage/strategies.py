"""Settings of Lightning's Trainer that stages support: strategies and loop arguments. No torch here."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf.errors import UserError, key

#: Strategies that keep whole weights on every rank, by name or by class.
WHOLE = re.compile(r"auto|single_device|ddp(_\w+)?|(.*\.)?(DDP|SingleDevice)Strategy")

#: Arguments of Lightning's own optimizer loop -> (the config key to use instead, the value without effect).
INSTEAD = {"gradient_clip_val": ("stage.gradient_clip", 0), "accumulate_grad_batches": ("stage.micro_batch_size", 1)}


def trainer_problems(trainer: Mapping[str, Any]) -> Iterator[UserError]:
    """Yield the problems of a trainer's config, without the name of the step that it belongs to."""
    strategy = trainer.get("strategy", "auto")
    name = strategy.get("_target_") if isinstance(strategy, Mapping) else strategy
    if isinstance(name, str) and not WHOLE.fullmatch(name):
        yield sharding_error(name)
    for argument, (instead, nothing) in INSTEAD.items():
        if trainer.get(argument) not in (None, nothing):
            yield UserError(
                "a stage clips and accumulates gradients itself",
                fix=f"type {key(instead, '...')}",
                option=f"trainer.{argument}",
                value=trainer[argument],
            )


def sharding_error(strategy: str) -> UserError:
    """Return the error for a strategy that shards weights, gradients or optimizer states over ranks."""
    return UserError(
        "a stage supports ddp and single devices, and cannot train sharded weights yet (each rank would clip by the "
        "norm of its own shard of the gradient)",
        fix=f"type {key('trainer', 'ddp')}",
        option="trainer.strategy",
        value=strategy,
    )
