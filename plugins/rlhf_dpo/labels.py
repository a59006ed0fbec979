"""Losses on single replies that are labelled good or bad."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf.data.collate import LabelBatch, collate_labels, with_mismatches
from rlhf.data.data import Split
from rlhf.data.formats import labels_of
from rlhf.data.records import Comparison, Label
from rlhf.data.template import EncodedLabel
from rlhf.distributed import gather_rows
from rlhf.errors import UserError
from rlhf.models.language_model import LanguageModel
from rlhf.objective import LabelObjective, Metrics
from rlhf_dpo.pairs import Inputs, inputs


class Labels:
    """How a ``LabelObjective`` is fed.

    Its reference point z is one number for the whole batch: the mean log-ratio of replies to *other* prompts, over all
    micro-batches and all processes, without gradient. Which other prompt is fixed with the data.
    """

    needs_reference = True
    embedding = None

    def __init__(self, objective: LabelObjective) -> None:
        self.objective = objective

    def records(self, data: Split) -> Split:
        """The labelled replies; those of comparisons are labelled by whether they win or lose their pairs."""
        return labelled_replies(data)

    def check_records(self, name: str | None) -> None:
        """Refuses records that no labels can be made of; None says nothing."""
        check_labels(name)

    def check_batch(self, batch_size: int) -> None:
        """Any batch will do: the mismatched replies come from the whole data set."""

    def complete(self, examples: Sequence[EncodedLabel], longest: int, training: bool) -> list[EncodedLabel]:
        """Gives each reply's prompt the reply to another prompt; what is trained on needs some."""
        done = with_mismatches(examples, longest)
        if training and all(label.mismatched is None for label in done):
            raise UserError(
                "the KL estimate of this objective reads replies to other prompts, and all of these answer the same "
                "one (or none fits data.max_length with another prompt): give replies to several prompts"
            )
        return done

    def collate(self, examples: list[EncodedLabel], pad_id: int) -> LabelBatch:
        """Replies, and mismatched replies."""
        return collate_labels(examples, pad_id)

    def read(self, part: LabelBatch) -> list[Inputs]:
        """What the reference reads."""
        return [inputs(part.tokens), *([] if part.mismatched is None else [inputs(part.mismatched)])]

    def with_reference(
        self, examples: list[EncodedLabel], logp: list[float], mismatched: Sequence[float] = ()
    ) -> list[EncodedLabel]:
        """The replies with the reference's log-probabilities."""
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
        """[B] ones: every reply counts the same."""
        return torch.ones(len(part), device=part.desirable.device)

    def teaches(self, parts: list[LabelBatch], together: bool = True) -> bool:
        """Every batch does."""
        return True

    @torch.no_grad()
    def around(self, policy: LanguageModel, parts: list[LabelBatch], together: bool = True) -> Tensor:
        """z (scalar) of the whole batch, of all processes if ``together``; 0 where there is no mismatched reply."""
        own, reference = [], []
        for part in parts:
            if part.mismatched is not None and part.mismatched_reference is not None:
                own.append(policy.logprobs(*inputs(part.mismatched))[0].sum(dim=1))
                reference.append(part.mismatched_reference)
        nothing = parts[0].desirable.new_zeros(0, dtype=torch.float32)
        logp, ref_logp = torch.cat([nothing, *own]), torch.cat([nothing, *reference])
        if together:
            logp, ref_logp = gather_rows(logp)[0], gather_rows(ref_logp)[0]
        return self.objective.reference_point(logp, ref_logp) if len(logp) else logp.new_zeros(())

    def losses(self, policy: LanguageModel, part: LabelBatch, around: Tensor, index: int) -> tuple[Tensor, Metrics]:
        """The objective per reply and its metrics, [B] each."""
        assert part.reference is not None
        logp = policy.logprobs(*inputs(part.tokens))[0].sum(dim=1)
        losses, metrics = self.objective(logp, part.reference, part.desirable, around)
        return losses, {**metrics, "reference_gap": (logp - part.reference).abs().detach()}


def labelled_replies(data: Split) -> Split:
    """Labels, of comparisons too. Raises UserError for other records, and where all are of one kind."""
    train, validation = _labelled(data.train, data), _labelled(data.validation, data)
    kinds = {label.desirable for label in train}
    if len(kinds) == 1:
        what = "good" if kinds.pop() else "bad"
        raise UserError(f"data.source={data.data.source}: all replies are {what}; this objective needs both kinds")
    return replace(data, train=train, validation=validation)


def _labelled(records: Sequence[Any], data: Split) -> list[Label]:
    found: list[Label] = []
    for record in records:
        if isinstance(record, Label):
            found.append(record)
        elif isinstance(record, Comparison):
            found += labels_of(record)
        else:
            check_labels(record.name)
    return found


def check_labels(name: str | None) -> None:
    """Refuses records that no labels can be made of; None says nothing."""
    if name not in (None, "label", "comparison"):
        raise UserError(
            f"this objective reads labelled replies, and the data holds {name}s: type data=labels or data=comparisons"
        )
