"""Batch adapter for losses on single responses that are labelled good or bad."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf.data.collate import LabelBatch, TokenBatch, add_mismatched_responses, collate_labels
from rlhf.data.encoded_rows import EncodedLabel
from rlhf.data.record_conversion import comparison_labels
from rlhf.data.records import Comparison, Label
from rlhf.data.split import Split
from rlhf.errors import UserError, key
from rlhf.functional.distributed import gather_rows
from rlhf.models.language_model import LanguageModel
from rlhf.objective import LabelObjective, Metrics


class Labels:
    """Batch adapter of a ``LabelObjective``.

    Its reference point z is one number for the whole batch: the mean log-ratio of responses to *other* prompts, over
    all micro-batches and all ranks, without gradient. The choice of the other prompt is fixed with the data.
    """

    needs_reference = True
    embedding = None

    def __init__(self, objective: LabelObjective) -> None:
        self.objective = objective

    def records(self, data: Split) -> Split:
        """Return the labelled responses; those of comparisons are labelled by whether they win or lose their pairs."""
        return labelled_responses(data)

    def check_records(self, name: str | None) -> None:
        """Raise UserError for a record type without labels; None passes."""
        check_labels(name)

    def check_batch(self, batch_size: int) -> None:
        """Accept any batch size: the mismatched responses come from the whole data set."""

    def complete(self, examples: Sequence[EncodedLabel], longest: int, training: bool) -> list[EncodedLabel]:
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

    def collate(self, examples: list[EncodedLabel], pad_id: int) -> LabelBatch:
        """Return a micro-batch of responses and mismatched responses as tensors."""
        return collate_labels(examples, pad_id)

    def read(self, part: LabelBatch) -> list[TokenBatch]:
        """Return the batches that the reference reads."""
        return [part.tokens, *([] if part.mismatched is None else [part.mismatched])]

    def with_reference(
        self, examples: list[EncodedLabel], logp: list[float], mismatched: Sequence[float] = ()
    ) -> list[EncodedLabel]:
        """Return the examples with the reference's log-probabilities, of mismatched responses too."""
        rest = iter(mismatched)
        return [
            replace(
                example,
                reference=own,
                mismatched_reference=None if example.mismatched is None else next(rest),
            )
            for example, own in zip(examples, logp, strict=True)
        ]

    def weight(self, part: LabelBatch) -> Tensor:
        """Return ones [B]: every response has the same weight."""
        return torch.ones(len(part), device=part.desirable.device)

    def teaches(self, parts: list[LabelBatch], together: bool = True) -> bool:
        """Return True: every batch has a gradient."""
        return True

    @torch.no_grad()
    def around(self, policy: LanguageModel, parts: list[LabelBatch], together: bool = True) -> Tensor:
        """Return z (scalar) of the whole batch; 0 if it has no mismatched response.

        Args:
            policy: The trained model.
            parts: This rank's micro-batches.
            together: Whether the batch includes all ranks; every rank must then call this method.
        """
        own, reference = [], []
        for part in parts:
            if part.mismatched is not None and part.mismatched_reference is not None:
                own.append(policy.logprobs(part.mismatched)[0].sum(dim=1))
                reference.append(part.mismatched_reference)
        nothing = parts[0].desirable.new_zeros(0, dtype=torch.float32)
        logp, ref_logp = torch.cat([nothing, *own]), torch.cat([nothing, *reference])
        if together:
            logp, ref_logp = gather_rows(logp)[0], gather_rows(ref_logp)[0]
        return self.objective.reference_point(logp, ref_logp) if len(logp) else logp.new_zeros(())

    def losses(self, policy: LanguageModel, part: LabelBatch, around: Tensor, index: int) -> tuple[Tensor, Metrics]:
        """Return the objective per response and its metrics, [B] each."""
        assert part.reference is not None
        logp = policy.logprobs(part.tokens)[0].sum(dim=1)
        losses, metrics = self.objective(logp, part.reference, part.desirable, around)
        return losses, {**metrics, "reference_gap": (logp - part.reference).abs().detach()}


def labelled_responses(data: Split) -> Split:
    """Return the data as labels; comparisons are converted.

    Raises:
        UserError: The data holds other records, or all training labels are equal.
    """
    train, validation = _labelled(data.train, data), _labelled(data.validation, data)
    kinds = {label.desirable for label in train}
    if len(kinds) == 1:
        raise UserError(
            f"all responses are {'good' if kinds.pop() else 'bad'}, and this objective needs both kinds",
            fix="give good and bad responses",
            option="data.source",
            value=data.data.source,
        )
    return replace(data, train=train, validation=validation)


def _labelled(records: Sequence[Any], data: Split) -> list[Label]:
    found: list[Label] = []
    for record in records:
        if isinstance(record, Label):
            found.append(record)
        elif isinstance(record, Comparison):
            found += comparison_labels(record)
        else:
            check_labels(record.name)
    return found


def check_labels(name: str | None) -> None:
    """Raise UserError for a record type without labels; None passes."""
    if name not in (None, "label", "comparison"):
        raise UserError(
            f"this objective reads labelled responses, and the data holds {name}s",
            fix=f"type {key('data', 'labels')} or {key('data', 'comparisons')}",
            option="data",
        )
