"""Losses on pairs of replies to one prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlhf.data.collate import PairBatch, TokenBatch, collate_comparisons
from rlhf.data.data import Split
from rlhf.data.records import Comparison
from rlhf.data.template import EncodedComparison
from rlhf.distributed import gather_rows, processes
from rlhf.errors import UserError
from rlhf.models.language_model import LanguageModel
from rlhf.objective import ContrastObjective, Metrics, PairContext, PairLogps, PairObjective

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
T = TypeVar("T", PairLogps, PairContext)


@dataclass(frozen=True)
class Coupled:
    """Losses that were computed over a whole batch, for each of its micro-batches."""

    losses: list[Tensor]  # [P] each, without gradient
    metrics: list[Metrics]
    by_chosen: list[Tensor]  # [P] each, gradient of the weighted sum of all losses by the pair's log-probabilities
    by_rejected: list[Tensor]


class Pairs:
    """How a ``PairObjective`` is fed.

    Most losses look at one pair at a time. Those that do not (``couples_pairs``) are computed on the log-probabilities
    of the whole batch, of all processes; every micro-batch then runs once more, now for its gradient, with the known
    derivative by its log-probabilities. So a micro-batch changes memory and time, and not the gradient.
    """

    def __init__(self, objective: PairObjective) -> None:
        self.objective = objective
        self.needs_reference = objective.needs_reference or objective.needs_prompt_embedding

    @property
    def embedding(self) -> tuple[str, str | None] | None:
        """Pooling and encoder of the prompts' embeddings, where the objective reads those."""
        return pooling_and_encoder(self.objective)

    def records(self, data: Split) -> Split:
        """The comparisons; refuses other records, and ones without the scores that the objective reads."""
        everything = [*data.train, *data.validation]
        other = next((record for record in everything if not isinstance(record, Comparison)), None)
        if other is not None:
            self.check_records(other.name)
        without = sum(record.scores is None for record in everything)
        if self.objective.needs_scores and without:
            raise UserError(
                f"this objective reads a numeric score of every reply, and {without} of {len(everything)} comparisons "
                "have none: give comparisons of stage=collect, or type objective=dpo"
            )
        return data

    def check_records(self, name: str | None) -> None:
        """Refuses records that hold no pairs; None says nothing."""
        if name not in (None, "comparison"):
            instead = " or objective=kto" if name == "label" else ""
            raise UserError(
                f"this objective reads pairs of replies, and the data holds {name}s: type data=comparisons{instead}"
            )

    def check_batch(self, batch_size: int) -> None:
        """Refuses a batch in which there is nothing to set a pair against."""
        if self.objective.couples_pairs and batch_size < 2:
            raise UserError(
                f"stage.batch_size={batch_size}: this objective sets the prompts of a batch against each other; "
                "type stage.batch_size=2 or more"
            )

    def complete(self, examples: Sequence[EncodedComparison], longest: int, training: bool) -> list[EncodedComparison]:
        """Nothing is missing."""
        return list(examples)

    def collate(self, examples: list[EncodedComparison], pad_id: int) -> PairBatch:
        """Every reply once, and the pairs among them."""
        return collate_comparisons(examples, pad_id)

    def read(self, part: PairBatch) -> list[Inputs]:
        """What the reference reads."""
        return [inputs(part.tokens)]

    def with_reference(self, examples: list[EncodedComparison], logp: list[float]) -> list[EncodedComparison]:
        """The comparisons with the reference's log-probability of each reply."""
        rest = iter(logp)
        return [replace(example, reference={row: next(rest) for row in example.used}) for example in examples]

    def weight(self, part: PairBatch) -> Tensor:
        """[P] 1 / the number of pairs of its prompt."""
        return part.weight

    def teaches(self, parts: list[PairBatch], together: bool = True) -> bool:
        """Every batch does."""
        return True

    def around(self, policy: LanguageModel, parts: list[PairBatch], together: bool = True) -> Coupled | None:
        """For losses that couple pairs: all of them, computed over the whole batch.

        Args:
            policy: The model that is trained.
            parts: This process's micro-batches.
            together: Whether the batch is that of all processes; every one of them must then call this.
        """
        if not self.objective.couples_pairs or (len(parts) == 1 and not (together and processes() > 1)):
            return None  # one micro-batch has all there is
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
        """The objective per pair and its metrics, [P] each, of micro-batch number ``index``."""
        logps = pair_logps(policy, part)
        reference = _reference(part)
        if around is None:
            losses, metrics = self.objective(logps, reference, self._context([part]))
        else:
            # The value is the known loss, the slope that of the whole batch's sum; the weight is put on again later.
            slope = around.by_chosen[index] * logps.chosen + around.by_rejected[index] * logps.rejected
            losses = around.losses[index] + (slope - slope.detach()) / part.weight
            metrics = around.metrics[index]
        if reference is not None:
            gap = (logps.chosen - reference.chosen).abs() + (logps.rejected - reference.rejected).abs()
            metrics = {**metrics, "reference_gap": gap.detach()}
        return losses, metrics

    def _context(self, parts: list[PairBatch]) -> PairContext:
        """What is known of the pairs besides log-probabilities."""
        scored = all(part.scores is not None for part in parts)
        embedded = all(part.embedding is not None for part in parts)
        return PairContext(
            chosen_score=torch.cat([part.scores[part.chosen] for part in parts]) if scored else None,  # type: ignore[index]
            rejected_score=torch.cat([part.scores[part.rejected] for part in parts]) if scored else None,  # type: ignore[index]
            prompt_embedding=torch.cat([part.embedding for part in parts]) if embedded else None,  # type: ignore[misc]
            prompt_index=torch.cat([part.prompt_index for part in parts]),
        )


def pooling_and_encoder(objective: PairObjective | ContrastObjective) -> tuple[str, str | None] | None:
    """Of the prompts' embeddings, where the objective reads those."""
    if not objective.needs_prompt_embedding:
        return None
    return getattr(objective, "pooling", "mean"), getattr(objective, "encoder", None)


def inputs(tokens: TokenBatch) -> Inputs:
    """What a model reads."""
    return tokens.ids, tokens.attention_mask, tokens.position_ids, tokens.loss_mask


def pair_logps(policy: LanguageModel, part: PairBatch) -> PairLogps:
    """Log-probabilities of the pairs of a micro-batch, every reply read once."""
    logp, _ = policy.logprobs(*inputs(part.tokens))
    return _paired(logp.sum(dim=1), part)


def _paired(logp: Tensor, part: PairBatch) -> PairLogps:
    """Log-probabilities of replies [R] as those of pairs [P]."""
    lengths = part.tokens.loss_mask.sum(dim=1)
    return PairLogps(logp[part.chosen], logp[part.rejected], lengths[part.chosen], lengths[part.rejected])


def _reference(part: PairBatch) -> PairLogps | None:
    return None if part.reference is None else _paired(part.reference, part)


def _joined(logps: Sequence[PairLogps]) -> PairLogps:
    return PairLogps(*(torch.cat([getattr(each, field.name) for each in logps]) for field in fields(PairLogps)))


def _gathered(values: T) -> T:
    """A dataclass of rows with those of all processes."""
    rows = {field.name: getattr(values, field.name) for field in fields(values)}  # type: ignore[arg-type]
    gathered: Any = {name: None if row is None else gather_rows(row)[0] for name, row in rows.items()}
    return type(values)(**gathered)
