"""Settings of Lightning's Trainer that stages support: strategies and loop arguments. No torch here."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf.errors import UserError, key

#: Strategies that keep whole weights on every rank, by name or by class.
WHOLE = re.compile(r"auto|single_device|ddp(_\w+)?|(.*\.)?(DDP|SingleDevice)Strategy")

#: Strategy of `trainer=fsdp`, which shards weights, gradients and optimizer state.
SHARDED = "rlhf.stage.sharded_strategy.ShardedStrategy"

#: Arguments of Lightning's own optimizer loop -> (the config key to use instead, the value without effect).
INSTEAD = {"gradient_clip_val": ("stage.gradient_clip", 0), "accumulate_grad_batches": ("stage.micro_batch_size", 1)}


def trainer_problems(trainer: Mapping[str, Any]) -> Iterator[UserError]:
    """Yield the problems of a trainer's config, without the name of the step that it belongs to."""
    name = _name(trainer)
    if isinstance(name, str) and name != SHARDED and not WHOLE.fullmatch(name):
        yield sharding_error(name)
    if name == SHARDED and trainer.get("inference_mode", True) is not False:
        yield UserError(
            "sharded weights that validation gathers must not become inference tensors",
            fix=f"type {key('trainer.inference_mode', 'false')}",
            option="trainer.inference_mode",
            value="true",
        )
    for argument, (instead, nothing) in INSTEAD.items():
        if trainer.get(argument) not in (None, nothing):
            yield UserError(
                "a stage clips and accumulates gradients itself",
                fix=f"type {key(instead, '...')}",
                option=f"trainer.{argument}",
                value=trainer[argument],
            )


def is_sharded(trainer: Mapping[str, Any]) -> bool:
    """Return whether a trainer's config is that of `trainer=fsdp`."""
    return _name(trainer) == SHARDED


def sharding_problems(config: Mapping[str, Any], shardable: bool) -> Iterator[UserError]:
    """Yield what `trainer=fsdp` has not been run with, in one step's config.

    Args:
        config: Resolved config of one step.
        shardable: Whether its stage can train with sharded weights.
    """
    if not is_sharded(config.get("trainer") or {}):
        return
    adapter, optimizer = config.get("adapter") or {}, str((config.get("optimizer") or {}).get("_target_"))
    precision = (config.get("precision") or {}).get("trainer")
    if not shardable:
        problem, fix = f"stage={config['stage']['name']} cannot train sharded weights", f"type {key('trainer', 'ddp')}"
        yield UserError(problem, fix, "trainer", "fsdp")
    if adapter.get("shared_base"):
        fix = f"type {key('adapter.shared_base', 'false')}, or {key('trainer', 'ddp')}"
        yield UserError("roles that share one base cannot be sharded", fix, "adapter.shared_base", "true")
    if adapter.get("quantize"):
        fix = f"type {key('adapter', 'lora')}, or {key('trainer', 'ddp')}"
        yield UserError("quantised weights cannot be sharded", fix, "adapter.quantize", adapter["quantize"])
    if optimizer.endswith("_8bit"):
        fix = f"type {key('optimizer', 'adamw')}, or {key('trainer', 'ddp')}"
        yield UserError("8-bit optimizers cannot update sharded weights", fix, "optimizer", optimizer.split(".")[-1])
    if isinstance(precision, str) and precision.startswith("16"):
        fix = f"type {key('precision', 'bf16')}, or {key('trainer', 'ddp')}"
        yield UserError("sharded gradients have no loss scale", fix, "precision", "fp16")


def offload_problems(config: Mapping[str, Any]) -> Iterator[UserError]:
    """Yield a problem if `stage.offload_frozen` has no effect with the trainer of one step's config."""
    trainer = config.get("trainer") or {}
    if not (config.get("stage") or {}).get("offload_frozen"):
        return
    option, fix = "stage.offload_frozen", f"type {key('stage.offload_frozen', 'false')}"
    if trainer.get("accelerator") == "cpu":
        yield UserError("has no effect on a CPU: frozen models are in its memory already", fix, option, "true")
    elif is_sharded(trainer):
        yield UserError(f"has no effect with {key('trainer', 'fsdp')}, which shards the reference", fix, option, "true")


def _name(trainer: Mapping[str, Any]) -> Any:
    strategy = trainer.get("strategy", "auto")
    return strategy.get("_target_") if isinstance(strategy, Mapping) else strategy


def sharding_error(strategy: str) -> UserError:
    """Return the error for a strategy that the stage does not support."""
    return UserError(
        f"strategies are ddp, single devices, and the one of {key('trainer', 'fsdp')} for stages that can be sharded",
        fix=f"type {key('trainer', 'ddp')} or {key('trainer', 'fsdp')}",
        option="trainer.strategy",
        value=strategy,
    )
