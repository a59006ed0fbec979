"""Metrics of a stage: rows of training, and means over the whole validation set."""

import pytorch_lightning as pl
import torch
from torch import Tensor

from rlhf.functional.distributed import sum_named_tensors
from rlhf.functional.reduction import weighted_mean
from rlhf.objective import Metrics


class MetricsLog(pl.LightningModule):
    """Part of a stage that logs its metrics."""

    def __init__(self) -> None:
        super().__init__()
        self._validated: dict[str, Tensor] = {}

    def record(self, metrics: Metrics, **more: float | Tensor) -> None:
        """Log one row of metrics."""
        self.log_dict({**metrics, **more}, sync_dist=True, on_step=True, on_epoch=False)

    def log_mean(self, name: str, values: Tensor, weights: Tensor) -> None:
        """Log a weighted mean over the whole validation set, independent of the split into batches and ranks.

        A metric may be missing on some ranks or batches; one missing everywhere is not logged.
        """
        total = float(weights.sum())
        if total > 0:
            self.log_share(name, weighted_mean(values.detach().float(), weights.float(), total), total)

    def log_share(self, name: str, mean: Tensor, weight: float) -> None:
        """Log as ``log_mean`` does, given a mean that is already computed.

        Args:
            name: Name of the metric.
            mean: Mean of one part of the validation set, a scalar.
            weight: Sum of that part's weights.
        """
        share = torch.stack(
            [mean.detach().float() * weight, torch.tensor(weight, dtype=torch.float32, device=mean.device)]
        )
        self._validated[name] = self._validated[name] + share if name in self._validated else share

    def on_validation_epoch_start(self) -> None:
        """Reset the validation sums."""
        self._validated = {}

    def on_validation_epoch_end(self) -> None:
        """Log the means over the whole validation set.

        Lightning's own reduction matches metrics of different ranks by position, not by name.
        """
        for name, (total, weight) in sum_named_tensors(self._validated, self.device).items():
            self.log(name, total / weight, sync_dist=True)
        self._validated = {}
