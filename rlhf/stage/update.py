"""Optimizer step of a stage: exact gradient accumulation, clipping and the learning rate."""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.errors import RunFailed, key
from rlhf.functional.distributed import average_gradients
from rlhf.functional.reduction import weighted_mean
from rlhf.models.language_model import LanguageModel
from rlhf.models.module_state import check_gradients
from rlhf.models.sharding import reshard, whole_value
from rlhf.models.weight_casts import forget_casts
from rlhf.objective import Metrics
from rlhf.stage.batch_order import BatchOrder

__all__ = ["Optimizer", "Schedule"]


Schedule = Callable[[int, int], float]
Optimizer = Callable[..., torch.optim.Optimizer]


class Update(BatchOrder):
    """Part of a stage that accumulates gradients and makes optimizer steps.

    A loss is a weighted sum divided by the sum of the weights over the *whole* batch, across all micro-batches and all
    ranks, so that neither micro-batches nor ranks change the gradient.
    """

    policy: LanguageModel
    gradient_clip: float | None
    run_directory: Path
    _optimizer: Optimizer | None
    _scheduler: Schedule | None

    def __init__(self) -> None:
        super().__init__()
        self.updates_done = 0
        self._tokens_seen: int | Tensor = 0
        self.examples_seen = 0
        self._sums: dict[str, Tensor] = {}
        self._norm = torch.zeros(())  # norm of the last gradient, before clipping
        self._averages = False

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        """Build one optimizer over all trained parameters.

        Weight decay applies to matrices and not to vectors (norms, biases).
        """
        if self._optimizer is None:
            return None
        trained = {id(p): p for m in self.modules_trained() for p in m.parameters() if p.requires_grad}
        groups = [[p for p in trained.values() if p.ndim >= 2], [p for p in trained.values() if p.ndim < 2]]
        named: list[dict[str, Any]] = [{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}]
        make = self._optimizer
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None and "fused" in signature(make).parameters:
            make = partial(make, fused=False)  # gradients are clipped after the loss scale has been divided out
        optimizer = make([group for group in named if group["params"]])
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    @property
    def total_steps(self) -> int:
        """Training batches in the whole run."""
        return len(self.batches)

    @property
    def total_updates(self) -> int:
        """Optimizer steps in the whole run, the length of the learning rate schedule."""
        return self.total_steps

    def schedule_position(self) -> tuple[int, int]:
        """Return the position in the learning rate schedule and the schedule's length."""
        return self.updates_done, self.total_updates

    def modules_trained(self) -> Sequence[nn.Module]:
        """Return the modules whose parameters the optimizer updates."""
        return [self.policy]

    def loss_denominator(self, count: Tensor) -> Tensor:
        """Return the loss denominator: the global sum of weights divided by the world size, at least 1e-8.

        The division by the world size is there because gradients are averaged over ranks.

        Args:
            count: Sum of the weights on this rank, a scalar.
        """
        if self.trainer.world_size > 1:
            count = self.trainer.strategy.reduce(count.float(), reduce_op="mean")  # type: ignore[assignment]
        return count.float().clamp(min=1e-8)

    def sum_over_ranks(self, part: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks. Collective: every rank must call it equally often."""
        if self.trainer.world_size == 1:
            return part
        return self.trainer.strategy.reduce(part.clone(), reduce_op="sum")  # type: ignore[return-value]

    def backward_mean(
        self, losses: Tensor, weights: Tensor, total: Tensor, metrics: Metrics | None = None, scale: float = 1.0
    ) -> None:
        """Add the gradient of ``scale * sum(losses * weights) / total`` and accumulate the means of the metrics.

        Args:
            losses: The objective's values, any shape.
            weights: Weights of the losses, same shape.
            total: Sum of the weights over the whole batch, from ``loss_denominator``.
            metrics: Further values of the same shape, for the log.
            scale: Coefficient of this term of the loss.
        """
        weights = weights.to(losses.dtype)
        loss = scale * weighted_mean(losses, weights, total)
        self.manual_backward(loss)
        self._sums["loss"] = self._sums["loss"] + loss.detach() if "loss" in self._sums else loss.detach()
        self.gather_means(metrics or {}, weights, total)

    def gather_means(self, metrics: Metrics, weights: Tensor, total: Tensor) -> None:
        """Add ``sum(values * weights) / total`` of each metric to the metrics of this optimizer step."""
        for name, values in metrics.items():
            mean = weighted_mean(values.float(), weights.float(), total)
            self._sums[name] = self._sums[name] + mean if name in self._sums else mean

    def step(self, frozen: nn.Module | None = None) -> Metrics:
        """Make one optimizer step and return the metrics that ``backward_mean`` accumulated.

        Sets the learning rate and clips the gradient (``on_before_optimizer_step``).

        Under DDP the gradients are averaged over ranks here, once per optimizer step, however many backward passes each
        rank made; under FSDP every backward pass averages them. With a gradient scaler (precision=fp16) the optimizer
        skips a step whose gradient overflows. Such a step still counts in ``updates_done``, so that the schedule ends
        where it should; ``skipped_steps`` is then 1.

        Args:
            frozen: Module whose parameters do not change in this step.

        Raises:
            RunFailed: The loss is not finite, or gradients overflow at a loss scale of 1 or less.
        """
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        metrics, self._sums = self._sums, {}
        loss = self.sum_over_ranks(metrics["loss"])  # all ranks must stop together, or the others would hang
        if not torch.isfinite(loss):
            raise self._not_finite(loss)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for module in self.modules_trained():
            reshard(module)
        if self._averages:
            average_gradients(parameters)
        if self.updates_done == 0:
            for module in self.modules_trained():
                check_gradients(module)
        if frozen is not None:
            frozen.zero_grad(set_to_none=True)
        factor = self._scheduler(*self.schedule_position()) if self._scheduler else 1.0
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = 0.0 if scaler is None else scaler.get_scale()
        self._norm = torch.zeros((), device=self.device)
        if scaler is None or any(p.grad is not None for p in parameters):  # a scaler raises without gradients
            optimizer.step()
        for module in self.modules_trained():
            forget_casts(module)
        optimizer.zero_grad()
        self.updates_done += 1
        metrics["learning_rate"] = torch.tensor(optimizer.param_groups[0]["lr"])
        if scaler is None:
            return {**metrics, "gradient_norm": self._norm}
        skipped = scaler.get_scale() < scale
        if skipped and scale <= 1.0:
            raise RunFailed(
                f"gradients overflow in 16 bits at a loss scale of {scale:g}, at batch {self.batches_done}",
                fix=f"type {key('precision', 'bf16')}, or a smaller {key('optimizer.lr')}",
            )
        if not skipped:
            metrics["gradient_norm"] = self._norm
        return {**metrics, "skipped_steps": torch.tensor(float(skipped)), "loss_scale": torch.tensor(scale)}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient. Called within the optimizer's step, after the loss scale has been divided out.

        Raises:
            RunFailed: The gradient is not finite. Not raised under a gradient scaler, which skips such steps.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # Of sharded gradients this is the norm of the whole ones: the norm of the shards' norms over all ranks.
        self._norm = whole_value(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        nn.utils.clip_grads_with_norm_(parameters, self.gradient_clip or float("inf"), self._norm)
        if getattr(self.trainer.precision_plugin, "scaler", None) is None and not torch.isfinite(self._norm):
            raise self._not_finite(self._norm, "gradient of the loss")

    def count(self, examples: int, tokens: int | Tensor) -> None:
        """Count the examples and tokens trained on, for the throughput.

        Both are given for this rank and multiplied by the world size. The tokens stay on their device: a GPU would have
        to finish all its work before their number is known.
        """
        self.examples_seen += examples * self.trainer.world_size
        self._tokens_seen = self._tokens_seen + tokens * self.trainer.world_size

    @property
    def tokens_seen(self) -> int:
        """Return the number of tokens trained on, over all ranks."""
        return int(self._tokens_seen)

    def _not_finite(self, value: Tensor, name: str = "loss") -> RunFailed:
        """Write the step's number to ``failed_step.txt``, and return the error."""
        file = self.run_directory / "failed_step.txt"
        file.write_text(
            f"batch {self.batches_done}, update {self.updates_done}, {name} {value.item()}\n", encoding="utf-8"
        )
        others = f"{key('stage.gradient_clip', 1.0)} or {key('precision', 'fp32')}"
        return RunFailed(
            f"the {name} became {value.item()} at batch {self.batches_done} (see {file})",
            fix=f"type a smaller {key('optimizer.lr')}, {others}",
        )
