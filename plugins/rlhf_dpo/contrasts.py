"""Batch adapter for losses that contrast good with bad responses, of any prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf.data.collate import LabelBatch, TokenBatch, collate_labels
from rlhf.data.encoded_rows import EncodedLabel
from rlhf.data.split import Split
from rlhf.errors import UserError, key
from rlhf.functional.distributed import gather_rows, world_size
from rlhf.models.language_model import LanguageModel
from rlhf.objective import ContrastObjective, Metrics
from rlhf_dpo.labels import check_labels, labelled_responses
from rlhf_dpo.pairs import pooling_and_encoder


@dataclass(frozen=True)
class Known:
    """Losses computed over a whole batch, split by micro-batch."""

    losses: list[Tensor]  # [N] each, without gradient
    metrics: list[Metrics]
    slopes: list[Tensor]  # [N] each, gradient of the sum of all losses with respect to the log-probability


class Contrasts:
    """Batch adapter of a ``ContrastObjective``, which reads the log-probabilities of the whole batch, of all ranks.

    Gradient caching, as for coupled pairs: every micro-batch runs a second time for its gradient, so that its size
    changes memory and time alone.
    """

    needs_reference = True

    def __init__(self, objective: ContrastObjective) -> None:
        self.objective = objective

    @property
    def embedding(self) -> tuple[str, str | None] | None:
        """Pooling and encoder of the prompts' embeddings; None if the objective reads none."""
        return pooling_and_encoder(self.objective)

    def records(self, data: Split) -> Split:
        """Return the labelled responses; those of comparisons are labelled by whether they win or lose their pairs."""
        return labelled_responses(data)

    def check_records(self, name: str | None) -> None:
        """Raise UserError for a record type without labels; None passes."""
        check_labels(name)

    def check_batch(self, batch_size: int) -> None:
        """Raise UserError for a batch too small to hold a contrast."""
        if batch_size < 2:
            raise UserError(
                "this objective contrasts the good responses of a batch with its bad ones",
                fix=f"type {key('stage.batch_size', 2)} or more",
                option="stage.batch_size",
                value=batch_size,
            )

    def complete(self, examples: Sequence[EncodedLabel], longest: int, training: bool) -> list[EncodedLabel]:
        """Return the examples unchanged."""
        return list(examples)

    def collate(self, examples: list[EncodedLabel], pad_id: int) -> LabelBatch:
        """Return a micro-batch of responses as tensors."""
        return collate_labels(examples, pad_id)

    def read(self, part: LabelBatch) -> list[TokenBatch]:
        """Return the batches that the reference reads."""
        return [part.tokens]

    def with_reference(self, examples: list[EncodedLabel], logp: list[float]) -> list[EncodedLabel]:
        """Return the examples with the reference's log-probabilities."""
        return [replace(example, reference=value) for example, value in zip(examples, logp, strict=True)]

    def weight(self, part: LabelBatch) -> Tensor:
        """Return ones [N]: the mean over responses of their shares is the mean over contrasts."""
        return torch.ones(len(part), device=part.desirable.device)

    def teaches(self, parts: list[LabelBatch], together: bool = True) -> bool:
        """Return whether the batch, of all ranks if ``together``, holds responses of both kinds."""
        desirable = torch.cat([part.desirable for part in parts])
        good = (gather_rows(desirable.float())[0] if together else desirable.float()) > 0.5
        return bool(good.any()) and not bool(good.all())

    def around(self, policy: LanguageModel, parts: list[LabelBatch], together: bool = True) -> Known | None:
        """Compute all losses of the batch, and their gradient by each log-probability (gradient caching).

        Args:
            policy: The trained model.
            parts: This rank's micro-batches.
            together: Whether the batch includes all ranks; every rank must then call this method.

        Returns:
            The losses by micro-batch; None if one micro-batch holds the whole batch.
        """
        if len(parts) == 1 and not (together and world_size() > 1):
            return None  # one micro-batch is the whole batch
        with torch.no_grad():
            own = torch.cat([policy.logprobs(part.tokens)[0].sum(dim=1) for part in parts])
        reference, desirable, embedding = (
            torch.cat([getattr(part, name) for part in parts]) if getattr(parts[0], name) is not None else None
            for name in ("reference", "desirable", "embedding")
        )
        assert reference is not None and desirable is not None
        here = slice(None)
        if together:
            own, here = gather_rows(own)
            reference, desirable = gather_rows(reference)[0], gather_rows(desirable.float())[0] > 0.5
            embedding = None if embedding is None else gather_rows(embedding)[0]
        whole = own.clone().requires_grad_(torch.is_grad_enabled())
        losses, metrics = self.objective(whole, reference, desirable, embedding)
        slopes = torch.autograd.grad(losses.sum(), whole)[0] if whole.requires_grad else torch.zeros_like(own)
        sizes = [len(part) for part in parts]
        pieces = {name: values[here].split(sizes) for name, values in metrics.items()}
        return Known(
            losses=list(losses.detach()[here].split(sizes)),
            metrics=[{name: values[i] for name, values in pieces.items()} for i in range(len(parts))],
            slopes=list(slopes[here].split(sizes)),
        )

    def losses(
        self, policy: LanguageModel, part: LabelBatch, around: Known | None, index: int
    ) -> tuple[Tensor, Metrics]:
        """Return the objective per response and its metrics, [N] each, of micro-batch number ``index``."""
        assert part.reference is not None
        logp = policy.logprobs(part.tokens)[0].sum(dim=1)
        if around is None:
            losses, metrics = self.objective(logp, part.reference, part.desirable, part.embedding)
        else:
            # The value is the cached loss; the gradient is that of the whole batch's sum.
            slope = around.slopes[index] * logp
            losses, metrics = around.losses[index] + slope - slope.detach(), around.metrics[index]
        return losses, {**metrics, "reference_gap": (logp - part.reference).abs().detach()}
