"""Batch adapter for losses on single responses that are labelled good or bad."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlhf.data.collate import LabelBatch, add_mismatched_responses, collate_labels
from rlhf.data.encoded_rows import EncodedLabel
from rlhf.data.record_conversion import comparison_labels
from rlhf.data.records import Comparison, Label
from rlhf.data.sources import source_error
from rlhf.data.split import Split
from rlhf.errors import UserError, key
from rlhf.functional.distributed import gather_rows
from rlhf.models.language_model import LanguageModel
from rlhf.models.reference_cache import Row
from rlhf.objective import LabelObjective, Metrics
from rlhf_dpo.batch_adapter import BatchAdapter

Terms = TypeVar("Terms")


class LabelledResponses(BatchAdapter[EncodedLabel, LabelBatch, Terms]):
    """Base class of batch adapters for objectives on single responses that are labelled good or bad."""

    def read_records(self, data: Split) -> Split:
        """Return the labelled responses; those of comparisons are labelled by whether they win or lose their pairs.

        Raises:
            UserError: The data holds other records, or all training labels are equal.
        """
        train, validation = self._labels(data.train), self._labels(data.validation)
        kinds = {label.desirable for label in train}
        if len(kinds) == 1:
            raise source_error(
                data.data.source,
                f"all responses are {'good' if kinds.pop() else 'bad'}, and this objective needs both kinds",
                fix="give good and bad responses",
            )
        return replace(data, train=train, validation=validation)

    def _labels(self, records: Sequence[Any]) -> list[Label]:
        found: list[Label] = []
        for record in records:
            if isinstance(record, Label):
                found.append(record)
            elif isinstance(record, Comparison):
                found += comparison_labels(record)
            else:
                self.check_records(record.name)
        return found

    def check_records(self, name: str | None) -> None:
        """Raise UserError for a record type without labels; None passes."""
        if name not in (None, "label", "comparison"):
            raise UserError(
                f"this objective reads labelled responses, and the data holds {name}s",
                fix=f"type {key('data', 'labels')} or {key('data', 'comparisons')}",
                option="data",
            )

    def collate(self, examples: list[EncodedLabel], pad_id: int) -> LabelBatch:
        """Return a micro-batch of responses, and mismatched responses if the examples have them, as tensors."""
        return collate_labels(examples, pad_id)

    def reference_rows(self, example: EncodedLabel) -> list[Row]:
        """Return the response with its prompt."""
        return [(example.prompt, example.response)]

    def with_reference(self, example: EncodedLabel, logps: list[float]) -> EncodedLabel:
        """Return the example with the reference's log-probability of the response."""
        return replace(example, reference=logps[0])

    def weight(self, part: LabelBatch) -> Tensor:
        """Return ones [N]: every response has the same weight."""
        return torch.ones(len(part), device=part.desirable.device)


class Labels(LabelledResponses[Tensor]):
    """Batch adapter of a ``LabelObjective``.

    Its reference point z is one number for the whole batch: the mean log-ratio of responses to *other* prompts, over
    all micro-batches and all ranks, without gradient. The choice of the other prompt is fixed with the data, so that a
    batch may have any size.
    """

    objective: LabelObjective

    def add_mismatched(self, examples: Sequence[EncodedLabel], longest: int, training: bool) -> list[EncodedLabel]:
        """Add to each prompt the response to another prompt (mismatched).

        Raises:
            UserError: No training example has a mismatched response.
        """
        done = add_mismatched_responses(examples, longest)
        if training and all(label.mismatched is None for label in done):
            raise UserError(
                "the KL estimate of this objective reads responses to other prompts, and all responses of the data are "
                f"to one prompt (or none fits {key('data.max_length')} with another prompt)",
                fix="give responses to several prompts",
                option="data",
            )
        return done

    def reference_rows(self, example: EncodedLabel) -> list[Row]:
        """Return the response and the mismatched one, if there is one, with their prompt."""
        mismatched = [] if example.mismatched is None else [(example.prompt, example.mismatched)]
        return [*super().reference_rows(example), *mismatched]

    def with_reference(self, example: EncodedLabel, logps: list[float]) -> EncodedLabel:
        """Return the example with the reference's log-probabilities, of a mismatched response too."""
        return replace(example, reference=logps[0], mismatched_reference=logps[1] if len(logps) > 1 else None)

    @torch.no_grad()
    def batch_terms(self, policy: LanguageModel, parts: list[LabelBatch], across_ranks: bool = True) -> Tensor:
        """Return z (scalar) of the whole batch; 0 if it has no mismatched response."""
        own, reference = [], []
        for part in parts:
            if part.mismatched is not None and part.mismatched_reference is not None:
                own.append(policy.logprobs(part.mismatched)[0].sum(dim=1))
                reference.append(part.mismatched_reference)
        nothing = parts[0].desirable.new_zeros(0, dtype=torch.float32)
        logp, ref_logp = torch.cat([nothing, *own]), torch.cat([nothing, *reference])
        if across_ranks:
            logp, ref_logp = gather_rows(logp)[0], gather_rows(ref_logp)[0]
        return self.objective.reference_point(logp, ref_logp) if len(logp) else logp.new_zeros(())

    def losses(self, policy: LanguageModel, part: LabelBatch, terms: Tensor, index: int) -> tuple[Tensor, Metrics]:
        """Return the objective per response and its metrics, [N] each."""
        assert part.reference is not None
        logp = policy.logprobs(part.tokens)[0].sum(dim=1)
        losses, metrics = self.objective(logp, part.reference, part.desirable, terms)
        return losses, {**metrics, "reference_gap": (logp - part.reference).abs().detach()}
