"""The checks, in the order of their value: what does not fit the budget is left out at the end. Imports no torch."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """One check, run in a process of its own.

    Attributes:
        name: Name in the file and on the command line.
        title: What it establishes.
        function: "package.module:function", called with a Context and the arguments.
        limit: Seconds after which it is ended.
        alone: Whether nothing else may run beside it, as it measures time or memory.
        arguments: Further arguments of the function.
    """

    name: str
    title: str
    function: str
    limit: float
    alone: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


def _speed(stage: str, model: str) -> Check:
    title = f"{stage}, model of {model}: speed, share of the matrix rate, and peak memory beside the predicted one"
    arguments = {"stage": stage, "model": model}
    return Check(f"{stage}_{model}", title, "benchmarks.gpu.speed:train", 90, alone=True, arguments=arguments)


def checks(small: bool) -> list[Check]:
    """Return the checks; with ``small`` one size of model stands for all."""
    exact, sizes = "benchmarks.gpu.exactness", ("135m",) if small else ("135m", "1b", "0.5b")
    sampling = Check(
        "sampling",
        "new tokens/s of our sampler beside model.generate",
        "benchmarks.gpu.speed:sampling",
        90,
        alone=True,
        arguments={"model": "135m"},
    )
    attention = Check(
        "attention",
        "varlen attention equals attention per document, and their times",
        "benchmarks.gpu.attention:check",
        60,
        alone=True,
    )
    first, *others = ([_speed(stage, size) for stage in ("sft", "dpo", "ppo", "grpo")] for size in sizes)
    return [
        Check("device", "the device, its versions and matrix rates", "benchmarks.gpu.speed:start", 60, alone=True),
        Check(
            "models",
            "the random models of the measurements are built",
            "benchmarks.gpu.speed:build",
            150,
            arguments={"sizes": list(sizes)},
        ),
        Check("parity", "fp32: the first updates of every stage equal those on the CPU", f"{exact}:fp32", 150),
        Check("tests", "the tests marked gpu", "benchmarks.gpu.commands:tests", 150),
        Check("bf16", "bf16: loss drift against fp32", f"{exact}:bf16", 90),
        Check("fp16", "fp16: losses of fp32, an overflowing step is skipped", f"{exact}:fp16", 60),
        Check("resume", "a run that was ended and resumed equals a whole one", f"{exact}:resume", 120),
        Check("qlora", "QLoRA trains, with a base in NF4", f"{exact}:qlora", 90),
        Check("fsdp", "two stages with trainer=fsdp on one device", "benchmarks.gpu.commands:fsdp", 120),
        *first,
        sampling,
        attention,
        *(check for size in others for check in size),
    ]
