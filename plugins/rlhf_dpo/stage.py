"""Direct preference optimisation and its family: the policy learns from comparisons without a reward model."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rlhf.data.collate import PairBatch, TokenBatch, collate_comparisons
from rlhf.data.data import Split
from rlhf.data.records import Prompt
from rlhf.data.template import EncodedComparison
from rlhf.errors import RunFailed, UserError
from rlhf.models.language_model import LanguageModel
from rlhf.objective import Metrics, PairContext, PairLogps, PairObjective
from rlhf.stage import Optimizer, Parts, Schedule, Stage
from rlhf.supervised import sum_of


class DPOStage(Stage):
    """Any ``PairObjective`` on pairs of replies; reference log-probabilities are computed once, before training.

    Args:
        batch_size: Prompts per update.
        micro_batch_size: Prompts per forward pass, null: all.
        gradient_clip: Largest gradient norm, null: none.
        epochs: Times each comparison is seen.
    """

    telling = ("loss", "accuracy", "val/accuracy")
    headline = "val/accuracy"

    def __init__(
        self,
        model: LanguageModel,
        objective: PairObjective,
        data: Split,
        optimizer: Optimizer,
        scheduler: Schedule,
        *,
        batch_size: Annotated[int, Field(gt=0)] = 64,
        micro_batch_size: Annotated[int, Field(gt=0)] | None = None,
        gradient_clip: Annotated[float, Field(gt=0)] | None = 1.0,
        epochs: Annotated[float, Field(gt=0)] = 1,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            scheduler,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            gradient_clip=gradient_clip,
        )
        if objective.needs_prompt_embedding:
            raise UserError("this objective reads prompt embeddings, which stage=dpo does not make: type objective=dpo")
        self.objective, self.data, self.epochs = objective, data, epochs
        self.policy.disable_dropout()
        self.reference = model.reference() if objective.needs_reference else None

    def prepare(self) -> None:
        """Tokenises the comparisons and lets the reference read each of them once."""
        self.encode(self.data, self.policy.tokenizer)
        if self.objective.needs_scores and any(x.scores is None for x in [*self.examples, *self.held_out]):
            raise UserError("this objective reads numeric scores, which some comparisons lack: type objective=dpo")
        if self.reference is not None:
            self.reference.to(self.device)
            self.examples = self.with_reference(self.examples)
            self.held_out = self.with_reference(self.held_out)
        self.batches = self.order([len(example) for example in self.examples], epochs=self.epochs)

    def with_reference(self, comparisons: Sequence[EncodedComparison]) -> list[EncodedComparison]:
        """The comparisons with the reference's log-probability of every reply."""
        assert self.reference is not None
        done: list[EncodedComparison] = []
        for start in range(0, len(comparisons), self.batch_size):
            chosen = comparisons[start : start + self.batch_size]
            for part, group in zip(self.parts(list(chosen)), self.groups(chosen), strict=True):
                tokens = part.to(self.device).tokens
                logp = self.reference.logprobs(*_inputs(tokens)).sum(dim=1).tolist()
                for comparison in group:
                    rows = comparison.used
                    values = dict(zip(rows, logp, strict=False))
                    logp = logp[len(rows) :]
                    done.append(replace(comparison, reference=values))
        return done

    def groups(self, comparisons: Sequence[EncodedComparison]) -> list[Sequence[EncodedComparison]]:
        """Comparisons as ``parts`` cuts them into micro-batches."""
        size = self.micro_batch_size or len(comparisons)
        return [comparisons[i : i + size] for i in range(0, len(comparisons), size)]

    def collate(self, examples: list[EncodedComparison]) -> PairBatch:
        """Every reply once, and the pairs among them."""
        return collate_comparisons(examples, self.policy.pad_id)

    def losses(self, part: PairBatch) -> tuple[Tensor, Metrics]:
        """The objective per pair and its metrics, [P] each."""
        logp, _ = self.policy.logprobs(*_inputs(part.tokens))
        lengths = part.tokens.loss_mask.sum(dim=1)
        policy = pair(logp.sum(dim=1), lengths, part)
        reference = None if part.reference is None else pair(part.reference, lengths, part)
        context = None if part.scores is None else PairContext(part.scores[part.chosen], part.scores[part.rejected])
        losses, metrics = self.objective(policy, reference, context)
        if reference is not None:
            gaps = (policy.chosen - reference.chosen).abs() + (policy.rejected - reference.rejected).abs()
            metrics["reference_gap"] = gaps.detach()
        return losses, metrics

    def training_step(self, batch: Parts[PairBatch], batch_idx: int) -> None:
        """Mean over prompts of the mean over their pairs of the objective."""
        total = self.total(sum_of(part.weight.sum() for part in batch))
        for part in batch:
            losses, metrics = self.losses(part)
            if self.updates_done == 0 and self.reference is not None:
                self.check_start(metrics["reference_gap"])
            self.backward_mean(losses, part.weight, total, metrics)
            self.count(len(part.tokens), part.tokens.attention_mask.sum())
        self.record(self.step())

    def check_start(self, gap: Tensor) -> None:
        """At step 0 policy and reference are the same model, so every log-ratio is 0 and the loss is log 2."""
        if self.trainer.precision in ("32-true", "64-true") and gap.max() > 1e-2:
            raise RunFailed(
                f"policy and reference differ by {gap.max():.2g} nats before the first update: "
                "inputs.reference is another model, or dropout or padding differs"
            )

    def prompts_to_show(self) -> list[Prompt]:
        """Prompts of held-out comparisons."""
        return [Prompt(record.prompt, record.tags) for record in self.data.validation]

    @torch.no_grad()
    def validation_step(self, batch: Parts[PairBatch], batch_idx: int) -> None:
        """The same on held-out comparisons."""
        for part in batch:
            losses, metrics = self.losses(part)
            for name, values in {"loss": losses, **metrics}.items():
                self.log_mean(f"val/{name}", values, part.weight)


def pair(logp: Tensor, lengths: Tensor, part: PairBatch) -> PairLogps:
    """Log-probabilities of replies [R] as those of pairs [P]."""
    return PairLogps(logp[part.chosen], logp[part.rejected], lengths[part.chosen], lengths[part.rejected])


def _inputs(tokens: TokenBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tokens.ids, tokens.attention_mask, tokens.position_ids, tokens.loss_mask
