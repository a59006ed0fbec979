"""Batch adapter for losses on pairs of responses to one prompt."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlhf.data.collate import PairBatch, collate_comparisons
from rlhf.data.encoded_rows import EncodedComparison
from rlhf.data.records import Comparison
from rlhf.data.split import Split
from rlhf.errors import UserError, key
from rlhf.functional.distributed import gather_rows, world_size
from rlhf.models.language_model import LanguageModel
from rlhf.models.reference_cache import Row
from rlhf.objective import Metrics, PairContext, PairLogps, PairObjective
from rlhf_dpo.batch_adapter import BatchAdapter
from rlhf_dpo.gradient_caching import CachedLosses, cache_losses

T = TypeVar("T", PairLogps, PairContext)


class Pairs(BatchAdapter[EncodedComparison, PairBatch, CachedLosses | None]):
    """Batch adapter of a ``PairObjective``.

    Most losses read one pair at a time. Those that do not (``couples_pairs``) use gradient caching, over all ranks.
    """

    def __init__(self, objective: PairObjective) -> None:
        super().__init__(objective)
        self.needs_reference = objective.needs_reference or objective.needs_prompt_embedding

    def read_records(self, data: Split) -> Split:
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
                fix=f"give the comparisons of a run of stage=collect, or type {key('objective', 'dpo')}",
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

    def check_batch_size(self, batch_size: int) -> None:
        """Raise UserError for a batch too small for a loss that couples pairs."""
        if self.objective.couples_pairs and batch_size < 2:
            raise UserError(
                "this objective compares the prompts of a batch with each other",
                fix=f"type {key('stage.batch_size', 2)} or more",
                option="stage.batch_size",
                value=batch_size,
            )

    def collate(self, examples: list[EncodedComparison], pad_id: int) -> PairBatch:
        """Return a micro-batch: every response once, and the pairs among them."""
        return collate_comparisons(examples, pad_id)

    def reference_rows(self, example: EncodedComparison) -> list[Row]:
        """Return the responses that are in a pair, with their prompt."""
        return [(example.prompt, example.responses[index]) for index in example.used]

    def with_reference(self, example: EncodedComparison, logps: list[float]) -> EncodedComparison:
        """Return the comparison with the reference's log-probability of each response that is in a pair."""
        return replace(example, reference=dict(zip(example.used, logps, strict=True)))

    def weight(self, part: PairBatch) -> Tensor:
        """Return the weight of each pair [P]: 1 / the number of pairs of its prompt."""
        return part.weight

    def batch_terms(
        self, policy: LanguageModel, parts: list[PairBatch], across_ranks: bool = True
    ) -> CachedLosses | None:
        """Return the losses of coupled pairs of the batch and their derivatives by chosen and by rejected.

        None if the loss couples no pairs or one micro-batch holds the whole batch.
        """
        if not self.objective.couples_pairs or (len(parts) == 1 and not (across_ranks and world_size() > 1)):
            return None
        with torch.no_grad():
            logps = _joined([pair_logps(policy, part) for part in parts])
        references = [found for part in parts if (found := _reference(part)) is not None]
        reference = _joined(references) if references else None
        context = self._context(parts)
        weight, own = torch.cat([part.weight for part in parts]), slice(None)
        if across_ranks:
            logps, context = _gathered(logps), _gathered(context)
            reference = None if reference is None else _gathered(reference)
            weight, own = gather_rows(weight)

        def objective(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Metrics]:
            return self.objective(replace(logps, chosen=chosen, rejected=rejected), reference, context)

        return cache_losses(objective, [logps.chosen, logps.rejected], weight, own, [len(part) for part in parts])

    def losses(
        self, policy: LanguageModel, part: PairBatch, terms: CachedLosses | None, index: int
    ) -> tuple[Tensor, Metrics]:
        """Return the objective per pair and its metrics, [P] each, of micro-batch number ``index``."""
        logps = pair_logps(policy, part)
        reference = _reference(part)
        if terms is None:
            losses, metrics = self.objective(logps, reference, self._context([part]))
        else:
            # The value is the cached loss; the gradient is that of the whole batch's sum, whose weight is applied again
            # later.
            slope = terms.slope(index, logps.chosen, logps.rejected)
            losses = terms.losses[index] + (slope - slope.detach()) / part.weight
            metrics = terms.metrics[index]
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
