"""Base class of training on given text: pretraining, SFT and the fine-tuning of rejection sampling."""

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from rlhf.data.collate import TokenBatch, collate, packed
from rlhf.data.disk import lengths, store_like
from rlhf.data.encoded_rows import Encoded
from rlhf.data.split import Split
from rlhf.models.language_model import LanguageModel
from rlhf.objective import TokenObjective
from rlhf.stage.base import Stage
from rlhf.stage.batch_order import Parts
from rlhf.stage.checks import check_context
from rlhf.stage.update import Optimizer, Schedule

__all__ = ["Supervised", "sum_scalars"]


class Supervised(Stage):
    """Next-token prediction on the tokens whose loss mask is 1.

    Args:
        hyperparameters: Those of ``Stage``.
        epochs: Passes over the examples.
        packing: Tokens in a row that holds several documents (each attends only to itself); null: padded rows.
    """

    reads: ClassVar[dict[str, tuple[str, ...]]] = {"data": ("text", "demonstration")}
    progress_metrics = ("loss", "accuracy", "val/loss")
    headline = "val/loss"
    defaults: ClassVar[Mapping[str, Any]] = {"gradient_clip": 1.0}

    def __init__(
        self,
        model: LanguageModel,
        objective: TokenObjective,
        data: Split,
        optimizer: Optimizer,
        scheduler: Schedule,
        *,
        epochs: Annotated[float, Field(gt=0)],
        packing: Annotated[int, Field(gt=1)] | None = None,
        **hyperparameters: Any,
    ) -> None:
        super().__init__(model, optimizer, scheduler, **hyperparameters)
        self.objective = objective
        self.data, self.epochs, self.packing = data, epochs, packing
        if packing is not None:
            check_context(model, packing, "stage.packing")

    def read_examples(self) -> None:
        """Tokenize the data."""
        self.encode(self.data, self.policy.tokenizer)
        self.pack_and_batch()

    def pack_and_batch(self) -> None:
        """Pack the documents if ``packing`` is set, and build the batch sampler."""
        if self.packing:
            self.examples = store_like(packed(self.examples, self.packing), like=self.examples)
        self.batches = self.order(lengths(self.examples), epochs=self.epochs)

    def collate(self, examples: list[Encoded]) -> TokenBatch:
        """Return a micro-batch of padded or packed rows."""
        return collate(examples, self.policy.pad_id)

    def training_step(self, batch: Parts[TokenBatch], batch_idx: int) -> None:
        """Minimize the mean over the target tokens of the objective, -log p(token | prefix)."""
        total = self.loss_denominator(sum_scalars(part.loss_mask.sum() for part in batch))
        for part in batch:
            logp, _ = self.policy.logprobs(part, uniform=True)
            losses, metrics = self.objective(logp)
            self.backward_mean(losses, part.loss_mask, total, metrics)
            self.count(len(part.ids), part.attention_mask.sum())
        self.record(self.step())

    def validation_step(self, batch: Parts[TokenBatch], batch_idx: int) -> None:
        """Log the mean of -log p(token | prefix) over held-out documents."""
        for part in batch:
            logp, _ = self.policy.logprobs(part)
            self.log_mean("val/loss", -logp, part.loss_mask)

    def on_validation_epoch_end(self) -> None:
        """Log the perplexity, exp of the mean loss (of at most 50)."""
        super().on_validation_epoch_end()
        loss = self.trainer.callback_metrics.get("val/loss")
        if loss is not None:
            self.log("val/perplexity", math.exp(min(float(loss), 50.0)), sync_dist=True)


def sum_scalars(counts: Iterable[Tensor]) -> Tensor:
    """Return the sum of scalar tensors."""
    return torch.stack(list(counts)).sum()
