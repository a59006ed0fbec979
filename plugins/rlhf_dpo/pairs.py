"""Batch adapter for losses on pairs of responses to one prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlhf.data.collate import PairBatch, TokenBatch, collate_comparisons
from rlhf.data.encoded_rows import EncodedComparison
from rlhf.data.records import Comparison
from rlhf.data.split import Split
from rlhf.errors import UserError, key
from rlhf.functional.distributed import gather_rows, world_size
from rlhf.models.language_model import LanguageModel
from rlhf.objective import ContrastObjective, Metrics, PairContext, PairLogps, PairObjective

T = TypeVar("T", PairLogps, PairContext)


@dataclass(frozen=True)
class Coupled:
    """Losses computed over a whole batch, split by micro-batch."""

    losses: list[Tensor]  # [P] each, without gradient
    metrics: list[Metrics]
    by_chosen: list[Tensor]  # [P] each, gradient of the weighted sum of losses by the chosen log-probability
    by_rejected: list[Tensor]


class Pairs:
    """Batch adapter of a ``PairObjective``.

    Most losses read one pair at a time. Those that do not (``couples_pairs``) use gradient caching (GradCache): they
    are computed on the log-probabilities of the whole batch, of all ranks; every micro-batch then runs a second time
    for its gradient, with the cached derivative by its log-probabilities. The size of a micro-batch changes memory and
    time, not the gradient.
    """

    def __init__(self, objective: PairObjective) -> None:
        self.objective = objective
        self.needs_reference = objective.needs_reference or objective.needs_prompt_embedding

    @property
    def embedding(self) -> tuple[str, str | None] | None:
        """Pooling and encoder of the prompts' embeddings; None if the objective reads none."""
        return pooling_and_encoder(self.objective)

    def records(self, data: Split) -> Split:
        """Return the comparisons.

        Raises:
            UserError: There are other records, or comparisons lack the scores that the objective reads.
        """
        everything = [*data.train, *data.validation]
        other = next((record for record in everything if not isinstance(record, Comparison)), None)
        if other is not None:
            self.check_records(other.name)
        without = sum(record.scores is None for record in everything)
        if self.objective.needs_scores and without:
            raise UserError(
                f"this objective reads a numeric score of every response, and {without} of {len(everything)} "
                "comparisons have none",
                fix=f"give comparisons of stage=collect, or type {key('objective', 'dpo')}",
                option="data",
            )
        return data

    def check_records(self, name: str | None) -> None:
        """Raise UserError for a record type without pairs; None passes."""
        if name not in (None, "comparison"):
            other = f" or {key('objective', 'kto')}" if name == "label" else ""
            raise UserError(
                f"this objective reads pairs of responses, and the data holds {name}s",
                fix=f"type {key('data', 'comparisons')}{other}",
                option="data",
            )

    def check_batch(self, batch_size: int) -> None:
        """Raise UserError for a batch too small for a loss that couples pairs."""
        if self.objective.couples_pairs and batch_size < 2:
            raise UserError(
                "this objective compares the prompts of a batch with each other",
                fix=f"type {key('stage.batch_size', 2)} or more",
                option="stage.batch_size",
                value=batch_size,
            )

    def complete(self, examples: Sequence[EncodedComparison], longest: int, training: bool) -> list[EncodedComparison]:
        """Return the examples unchanged."""
        return list(examples)

    def collate(self, examples: list[EncodedComparison], pad_id: int) -> PairBatch:
        """Return a micro-batch: every response once, and the pairs among them."""
        return collate_comparisons(examples, pad_id)

    def read(self, part: PairBatch) -> list[TokenBatch]:
        """Return the batches that the reference reads."""
        return [part.tokens]

    def with_reference(self, examples: list[EncodedComparison], logp: list[float]) -> list[EncodedComparison]:
        """Return the comparisons with the reference's log-probability of each response."""
        rest = iter(logp)
        return [replace(example, reference={row: next(rest) for row in example.used}) for example in examples]

    def weight(self, part: PairBatch) -> Tensor:
        """Return the weight of each pair [P]: 1 / the number of pairs of its prompt."""
        return part.weight

    def teaches(self, parts: list[PairBatch], together: bool = True) -> bool:
        """Return True: every batch has a gradient."""
        return True

    def around(self, policy: LanguageModel, parts: list[PairBatch], together: bool = True) -> Coupled | None:
        """Compute the losses of coupled pairs over the whole batch, and their gradients (gradient caching).

        Args:
            policy: The trained model.
            parts: This rank's micro-batches.
            together: Whether the batch includes all ranks; every rank must then call this method.

        Returns:
            The losses by micro-batch; None if the loss couples no pairs or one micro-batch holds the whole batch.
        """
        if not self.objective.couples_pairs or (len(parts) == 1 and not (together and world_size() > 1)):
            return None  # one micro-batch is the whole batch
        with torch.no_grad():
            logps = [pair_logps(policy, part) for part in parts]
        whole = _joined(logps)
        references = [reference for part in parts if (reference := _reference(part)) is not None]
        reference = _joined(references) if references else None
        context = self._context(parts)
        weight, here = torch.cat([part.weight for part in parts]), slice(None)
        if together:
            whole, context = _gathered(whole), _gathered(context)
            reference = None if reference is None else _gathered(reference)
            weight, here = gather_rows(weight)
        chosen, rejected = (x.clone().requires_grad_(torch.is_grad_enabled()) for x in (whole.chosen, whole.rejected))
        losses, metrics = self.objective(replace(whole, chosen=chosen, rejected=rejected), reference, context)
        if torch.is_grad_enabled():
            by_chosen, by_rejected = torch.autograd.grad((losses * weight).sum(), [chosen, rejected])
        else:
            by_chosen, by_rejected = torch.zeros_like(weight), torch.zeros_like(weight)
        sizes = [len(part) for part in parts]
        pieces = {name: values[here].split(sizes) for name, values in metrics.items()}
        return Coupled(
            losses=list(losses.detach()[here].split(sizes)),
            metrics=[{name: values[i] for name, values in pieces.items()} for i in range(len(parts))],
            by_chosen=list(by_chosen[here].split(sizes)),
            by_rejected=list(by_rejected[here].split(sizes)),
        )

    def losses(
        self, policy: LanguageModel, part: PairBatch, around: Coupled | None, index: int
    ) -> tuple[Tensor, Metrics]:
        """Return the objective per pair and its metrics, [P] each, of micro-batch number ``index``."""
        logps = pair_logps(policy, part)
        reference = _reference(part)
        if around is None:
            losses, metrics = self.objective(logps, reference, self._context([part]))
        else:
            # The value is the cached loss; the gradient is that of the whole batch's sum, whose weight is applied again
            # later.
            slope = around.by_chosen[index] * logps.chosen + around.by_rejected[index] * logps.rejected
            losses = around.losses[index] + (slope - slope.detach()) / part.weight
            metrics = around.metrics[index]
        if reference is not None:
            gap = (logps.chosen - reference.chosen).abs() + (logps.rejected - reference.rejected).abs()
            metrics = {**metrics, "reference_gap": gap.detach()}
        return losses, metrics

    def _context(self, parts: list[PairBatch]) -> PairContext:
        """Return the inputs of the objective beside log-probabilities."""
        scored = all(part.scores is not None for part in parts)
        embedded = all(part.embedding is not None for part in parts)
        return PairContext(
            chosen_score=torch.cat([part.scores[part.chosen] for part in parts]) if scored else None,  # type: ignore[index]
            rejected_score=torch.cat([part.scores[part.rejected] for part in parts]) if scored else None,  # type: ignore[index]
            prompt_embedding=torch.cat([part.embedding for part in parts]) if embedded else None,  # type: ignore[misc]
            prompt_index=torch.cat([part.prompt_index for part in parts]),
        )


def pooling_and_encoder(objective: PairObjective | ContrastObjective) -> tuple[str, str | None] | None:
    """Return pooling and encoder of the prompts' embeddings; None if the objective reads none."""
    if not objective.needs_prompt_embedding:
        return None
    return getattr(objective, "pooling", "mean"), getattr(objective, "encoder", None)


def pair_logps(policy: LanguageModel, part: PairBatch) -> PairLogps:
    """Return the log-probabilities of the pairs of a micro-batch, each response passed once through the model."""
    logp, _ = policy.logprobs(part.tokens)
    return _paired(logp.sum(dim=1), part)


def _paired(logp: Tensor, part: PairBatch) -> PairLogps:
    """Return log-probabilities of responses [R] as those of pairs [P]."""
    lengths = part.tokens.loss_mask.sum(dim=1)
    return PairLogps(logp[part.chosen], logp[part.rejected], lengths[part.chosen], lengths[part.rejected])


def _reference(part: PairBatch) -> PairLogps | None:
    return None if part.reference is None else _paired(part.reference, part)


def _joined(logps: Sequence[PairLogps]) -> PairLogps:
    return PairLogps(*(torch.cat([getattr(each, field.name) for each in logps]) for field in fields(PairLogps)))


def _gathered(values: T) -> T:
    """Return a dataclass of rows with the rows of all ranks."""
    rows = {field.name: getattr(values, field.name) for field in fields(values)}  # type: ignore[arg-type]
    gathered: Any = {name: None if row is None else gather_rows(row)[0] for name, row in rows.items()}
    return type(values)(**gathered)
