"""Training on given text: what pretrain, SFT and the second half of rejection sampling share."""

import math
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from rlhf.data.collate import TokenBatch, collate, packed
from rlhf.data.data import Split
from rlhf.data.disk import keep, lengths
from rlhf.data.template import Encoded
from rlhf.models.language_model import LanguageModel
from rlhf.objective import TokenObjective
from rlhf.stage import Optimizer, Parts, Schedule, Stage, check_context


class Supervised(Stage):
    """Next-token prediction on the tokens whose loss mask is 1; ``read_examples`` gives the documents.

    Args:
        epochs: Times each example is seen.
        packing: Tokens in a row that holds several documents (each attends to itself alone); null pads instead.
    """

    reads: ClassVar[dict[str, tuple[str, ...]]] = {"data": ("text", "demonstration")}
    telling = ("loss", "accuracy", "val/loss")
    headline = "val/loss"

    def __init__(
        self,
        model: LanguageModel,
        objective: TokenObjective,
        data: Split,
        optimizer: Optimizer,
        scheduler: Schedule,
        *,
        batch_size: int,
        micro_batch_size: int | None,
        gradient_clip: float | None,
        epochs: float,
        packing: int | None,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            scheduler,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            gradient_clip=gradient_clip,
        )
        self.objective = objective
        self.data, self.epochs, self.packing = data, epochs, packing
        if packing is not None:
            check_context(model, packing, "stage.packing")

    def read_examples(self) -> None:
        """Tokenises the data."""
        self.encode(self.data, self.policy.tokenizer)
        self.arrange()

    def arrange(self) -> None:
        """Packs the documents, if that is asked for, and orders the batches."""
        if self.packing:
            self.examples = keep(packed(self.examples, self.packing), like=self.examples)
        self.batches = self.order(lengths(self.examples), epochs=self.epochs)

    def collate(self, examples: list[Encoded]) -> TokenBatch:
        """A micro-batch of padded or packed rows."""
        return collate(examples, self.policy.pad_id)

    def training_step(self, batch: Parts[TokenBatch], batch_idx: int) -> None:
        """Mean over the target tokens of -log p(token | what stands before it)."""
        total = self.total(sum_of(part.loss_mask.sum() for part in batch))
        for part in batch:
            logp, _ = self.policy.logprobs(part.ids, part.attention_mask, part.position_ids, part.loss_mask)
            losses, metrics = self.objective(logp)
            self.backward_mean(losses, part.loss_mask, total, metrics)
            self.count(len(part.ids), part.attention_mask.sum())
        self.record(self.step())

    def validation_step(self, batch: Parts[TokenBatch], batch_idx: int) -> None:
        """The same mean on held-out documents."""
        for part in batch:
            logp, _ = self.policy.logprobs(part.ids, part.attention_mask, part.position_ids, part.loss_mask)
            self.log_mean("val/loss", -logp, part.loss_mask)

    def on_validation_epoch_end(self) -> None:
        """Perplexity: what the mean loss means."""
        super().on_validation_epoch_end()
        loss = self.trainer.callback_metrics.get("val/loss")
        if loss is not None:
            self.log("val/perplexity", math.exp(min(float(loss), 50.0)), sync_dist=self.trainer.world_size > 1)


def sum_of(counts: Iterable[Tensor]) -> Tensor:
    """Sum of scalar tensors."""
    return torch.stack(list(counts)).sum()
