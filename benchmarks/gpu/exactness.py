"""Checks that compare two runs: CPU and GPU, 16 bits and 32, a whole run and a resumed one."""

import math
from pathlib import Path

import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor

from benchmarks.gpu.outcome import Context, Failed, Figures
from benchmarks.gpu.stages import STAGES, Interrupt, Interruption, Run, run
from rlhf.callbacks.checkpoints import latest
from rlhf.errors import first_line

# fp32 sums of another order differ by some 1e-6 in relation; gradients of a batch, and steps of Adam, by more.
ABSOLUTE, RELATIVE = 1e-4, 1e-3
WEIGHTS = 2e-4  # largest difference of a weight after updates at a learning rate of 1e-3
LOSS_BF16 = 0.02  # largest relative difference of a loss in bf16, which has 8 bits: 1/256 for each number
LOSS_FP16 = 0.01
UNCOMPARED = {"step", "epoch"}


def compare_rows(found: list[dict[str, float]], expected: list[dict[str, float]]) -> tuple[float, str]:
    """Return the largest difference of a metric in units of its tolerance, and the metric's name and row.

    The tolerance of a number x is ``ABSOLUTE + RELATIVE * |x|``. A metric or row that only one side has counts as
    infinite.
    """
    if len(found) != len(expected):
        return math.inf, f"{len(found)} rows, {len(expected)} expected"
    worst, place = 0.0, ""
    for number, (row, other) in enumerate(zip(found, expected, strict=True)):
        for name in (row.keys() | other.keys()) - UNCOMPARED:
            if name not in row or name not in other:
                return math.inf, f"{name} in row {number}"
            difference = abs(row[name] - other[name]) / (ABSOLUTE + RELATIVE * abs(other[name]))
            if not difference <= worst:  # nan, too
                worst, place = (math.inf if math.isnan(difference) else difference), f"{name} in row {number}"
    return worst, place


def compare_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference of a weight; infinite for other names."""
    if found.keys() != expected.keys():
        return math.inf
    return max(((found[name] - expected[name]).abs().max().item() for name in expected), default=0.0)


def fp32(context: Context) -> Figures:
    """Compare the first updates of every stage on the CPU and on the device, in fp32 without TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    figures: Figures = {"tolerance": {"absolute": ABSOLUTE, "relative": RELATIVE, "weight": WEIGHTS}}
    beyond = []
    for name in STAGES:
        try:
            expected, found = (
                run(name, context, context.folder / f"{name}-{device}", device=device)
                for device in ("cpu", context.device)
            )
        except Exception as error:  # the other stages are compared all the same
            figures[name] = {"error": f"{type(error).__name__}: {first_line(error)}"}
            beyond.append(name)
            continue
        worst, place = compare_rows(found.rows, expected.rows)
        moved = compare_weights(found.weights, expected.weights)
        figures[name] = {"updates": found.updates, "worst_metric": place, "worst_metric_in_tolerances": worst}
        figures[name]["largest_weight_difference"] = moved
        if not (worst <= 1 and moved <= WEIGHTS and found.updates > 0):
            beyond.append(name)
    if beyond:
        raise Failed(f"beyond the tolerance: {', '.join(beyond)}", figures)
    return figures


def bf16(context: Context) -> Figures:
    """Compare losses of 8 updates in bf16 (mixed and true) with those in fp32, on the same batches."""
    figures: Figures = {"loss_tolerance": LOSS_BF16}
    beyond = []
    for name in ("sft", "reward_model", "dpo"):
        exact = run(name, context, context.folder / f"{name}-fp32", batches=8)
        for precision in ("bf16", "bf16_true"):
            drifted = run(name, context, context.folder / f"{name}-{precision}", f"precision={precision}", batches=8)
            drift = loss_drift(drifted, exact)
            figures[f"{name}_{precision}"] = {"first_loss_drift": drift[0], "largest_loss_drift": max(drift)}
            if not drift[0] <= LOSS_BF16:
                beyond.append(f"{name} {precision}")
    if beyond:
        raise Failed(f"the first loss is beyond the tolerance: {', '.join(beyond)}", figures)
    return figures


def loss_drift(found: Run, expected: Run) -> list[float]:
    """Return the relative difference of each update's loss."""
    pairs = zip(found.rows, expected.rows, strict=True)
    return [abs(row["loss"] - other["loss"]) / max(abs(other["loss"]), 1e-8) for row, other in pairs]


def fp16(context: Context) -> Figures:
    """Train in fp16: with the usual loss scale the losses are those of fp32; an overflowing step is skipped."""
    exact = run("sft", context, context.folder / "fp32", batches=8)
    figures: Figures = {"loss_tolerance": LOSS_FP16}
    usual = run("sft", context, context.folder / "usual", batches=8, plugin=_scaled(context, 2.0**10, 0.5))
    drift = max(loss_drift(usual, exact))
    figures |= {"largest_loss_drift": drift, "skipped_steps": sum(row["skipped_steps"] for row in usual.rows)}
    plugin = _scaled(context, 2.0**40, 2.0**-30)
    skipping = run("sft", context, context.folder / "overflow", batches=4, plugin=plugin)
    skipped = [int(row["skipped_steps"]) for row in skipping.rows]
    figures["overflow"] = {"skipped_steps": skipped, "updates": skipping.updates}
    if skipped != [1, 0, 0, 0] or skipping.updates != 4:
        raise Failed("the step that overflows, and no other, should have been skipped", figures)
    if not drift <= LOSS_FP16:
        raise Failed("the losses are not those of fp32", figures)
    return figures


def _scaled(context: Context, scale: float, backoff: float) -> MixedPrecision:
    """Return the plugin of ``precision=fp16`` with an initial loss scale and the factor after an overflow."""
    scaler = torch.amp.GradScaler(context.device, init_scale=scale, backoff_factor=backoff)
    return MixedPrecision("16-mixed", context.device, scaler)


def resume(context: Context) -> Figures:
    """Compare a whole run with one that ends after two batches and is resumed from its checkpoint."""
    figures: Figures = {"weight_tolerance": WEIGHTS}
    beyond = []
    for name, precision in (("sft", "fp32"), ("dpo", "fp32"), ("ppo", "fp32"), ("grpo", "bf16"), ("sft", "bf16_true")):
        title = f"{name}-{precision}"
        words = (f"precision={precision}", "trainer.deterministic=warn")
        whole = run(name, context, context.folder / f"{title}-whole", *words, batches=4)
        folder = context.folder / f"{title}-resumed"
        try:
            run(name, context, folder, *words, batches=4, callbacks=[Interrupt(folder)])
        except Interruption:
            pass
        else:
            raise Failed(f"{title}: the run was not interrupted", figures)
        resumed = run(name, context, folder, *words, batches=4, resume=_checkpoint(folder))
        difference = compare_weights(resumed.weights, whole.weights)
        same = difference == 0 and resumed.rows == whole.rows
        figures[title] = {"same_bits": same, "largest_weight_difference": difference}
        if not (difference <= WEIGHTS and resumed.updates == whole.updates):
            beyond.append(title)
    if beyond:
        raise Failed(f"beyond the tolerance: {', '.join(beyond)}", figures)
    return figures


def _checkpoint(folder: Path) -> Path:
    checkpoint = latest(folder)
    if checkpoint is None:
        raise Failed(f"{folder.name} has no checkpoint")
    return checkpoint


def qlora(context: Context) -> Figures:
    """Train LoRA on a base in NF4: the base stays as it is, the adapter moves, the loss falls."""
    from importlib.util import find_spec

    from benchmarks.gpu.outcome import Skipped

    if find_spec("bitsandbytes") is None:
        raise Skipped("the package bitsandbytes is absent")
    model = "tiny" if context.small else "135m"
    words = ("adapter=qlora", "adapter.rank=8", "precision=bf16")
    figures: Figures = {}
    for name in ("sft", "dpo"):
        trained = run(name, context, context.folder / name, *words, model=model, batches=6)
        losses = [row["loss"] for row in trained.rows]
        count = sum(value.numel() for value in trained.weights.values())
        figures[name] = {"first_loss": losses[0], "last_loss": losses[-1], "trained_weights": count}
        figures[name]["gradient_norm"] = trained.rows[-1]["gradient_norm"]
        if not all(math.isfinite(loss) for loss in losses) or not trained.rows[-1]["gradient_norm"] > 0:
            raise Failed(f"{name}: a loss is not finite, or there is no gradient", figures)
    if context.device == "cuda":
        figures["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return figures
