"""Direct preference optimization and related losses: the policy learns from comparisons without a reward model."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from rlhf.callbacks.progress import work_of
from rlhf.data.records import Prompt
from rlhf.data.split import Split
from rlhf.errors import RunFailed, UserError, key
from rlhf.models.auxiliary_models import load_reference
from rlhf.models.language_model import LanguageModel
from rlhf.models.reference import Reference
from rlhf.models.reference_cache import cached_logprobs
from rlhf.models.vocabulary import OWN_REFERENCE, check_vocabulary
from rlhf.objective import ContrastObjective, LabelObjective, PairObjective
from rlhf.stage.base import Stage
from rlhf.stage.batch_order import Parts
from rlhf.stage.supervised import sum_scalars
from rlhf.stage.update import Optimizer, Schedule
from rlhf_dpo.batch_adapter import AnyAdapter
from rlhf_dpo.contrasts import Contrasts
from rlhf_dpo.embedding import embed_prompts
from rlhf_dpo.labels import Labels
from rlhf_dpo.pairs import Pairs


class DPOStage(Stage):
    """Stage for losses on pairs (``PairObjective``) or labelled responses (``LabelObjective``, ``ContrastObjective``).

    Reference log-probabilities and embeddings are computed once, before training, from exactly the tokens that are
    trained on; the reference is then freed. The log-probabilities are stored in the cache, which all runs with the same
    reference and data share (``rlhf.models.reference_cache``).

    Args:
        hyperparameters: Those of ``Stage``: ``batch_size`` and ``micro_batch_size`` are in prompts (labelled responses,
            for a loss on those).
        epochs: Passes over the comparisons.
        reference: Model that log-ratios are measured against, null: the initial policy.
    """

    progress_metrics = ("loss", "accuracy", "val/accuracy")
    headline = "val/accuracy"
    keeps_reference = False  # it reads the data once and is then freed
    auxiliary_models = {"reference": False}
    shardable = True
    defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 64, "gradient_clip": 1.0}

    def __init__(
        self,
        model: LanguageModel,
        objective: PairObjective | LabelObjective | ContrastObjective,
        data: Split,
        optimizer: Optimizer,
        scheduler: Schedule,
        *,
        epochs: Annotated[float, Field(gt=0)] = 1,
        reference: str | None = None,
        **hyperparameters: Any,
    ) -> None:
        super().__init__(model, optimizer, scheduler, **hyperparameters)
        self.check_parts(objective=objective, batch_size=self.batch_size, reference=reference)
        self.batch_adapter = select_adapter(objective)
        self.data, self.epochs = self.batch_adapter.read_records(data), epochs
        self.policy.disable_dropout()
        self.starts_at_reference = self.batch_adapter.needs_reference and reference is None
        self.reference: Reference | None = None
        if self.batch_adapter.needs_reference:
            self.reference = load_reference(model, reference)

    def roles(self) -> dict[str, Any]:
        """Return the policy, and the reference until it is freed."""
        return super().roles() | ({} if self.reference is None else {"reference": self.reference})

    @classmethod
    def check_parts(
        cls,
        *,
        objective: Any = None,
        batch_size: int = 2,
        model: Any = None,
        reference: str | None = None,
        record: str | None = None,
        **parts: Any,
    ) -> None:
        """Validate as ``Stage.check_parts``; also the record type and the reference against the objective."""
        super().check_parts(batch_size=batch_size, **parts)
        check_vocabulary(model, reference, "inputs.reference", OWN_REFERENCE)
        if objective is None:
            return
        adapter = select_adapter(objective)
        adapter.check_records(record)
        adapter.check_batch_size(batch_size)
        if reference is not None and not adapter.needs_reference:
            raise UserError(
                "this objective has no reference", fix="leave it out", option="inputs.reference", value=reference
            )

    def read_examples(self) -> None:
        """Tokenize the data and build the batch sampler."""
        self.encode(self.data, self.policy.tokenizer)
        self.check_lengths()
        longest = min(self.policy.context_length, self.data.data.max_length)
        self.examples = self.batch_adapter.add_mismatched(self.examples, longest, training=True)
        self.held_out = self.batch_adapter.add_mismatched(self.held_out, longest, training=False)
        self.batches = self.order([len(example) for example in self.examples], epochs=self.epochs)

    def prepare(self) -> None:
        """Read the data, and cache prompt embeddings and reference log-probabilities."""
        self.read_examples()
        if self.batch_adapter.embedding is not None:
            pooling, encoder = self.batch_adapter.embedding
            self.examples = embed_prompts(self.examples, self.reference, self.policy, pooling, encoder, self.batch_size)
            self.held_out = embed_prompts(self.held_out, self.reference, self.policy, pooling, encoder, self.batch_size)
        if self.reference is not None:
            self.reference.to(self.device)
            self.examples, self.held_out = self.with_reference(self.examples, self.held_out)
            self.reference = None  # its log-probabilities are cached; free the model

    def check_lengths(self) -> None:
        """Raise UserError if a row exceeds the model's context."""
        longest = max(len(example) for example in [*self.examples, *self.held_out])
        context = self.policy.context_length
        if longest > context:
            raise UserError(
                f"the longest prompt and response have {longest} tokens, more than the model's context of {context}",
                fix=f"type {key('data.max_length', context)}",
                option="data.max_length",
                value=self.data.data.max_length,
            )

    def with_reference(self, *parts: Sequence[Any]) -> list[list[Any]]:
        """Return the examples of each part with the reference's log-probabilities, read from the cache or computed."""
        assert self.reference is not None
        rows = [self.batch_adapter.reference_rows(example) for part in parts for example in part]
        flat = [row for of_example in rows for row in of_example]
        with work_of(self, "reference", len(flat), "row") as meter:
            logps = iter(
                cached_logprobs(self.reference, flat, self.policy.pad_id, self.device, meter.advance, self.note)
            )
        counts = iter(map(len, rows))
        return [
            [self.batch_adapter.with_reference(example, list(islice(logps, next(counts)))) for example in part]
            for part in parts
        ]

    def collate(self, examples: list[Any]) -> Any:
        """Return a micro-batch of examples as tensors."""
        return self.batch_adapter.collate(examples, self.policy.pad_id)

    def training_step(self, batch: Parts[Any], batch_idx: int) -> None:
        """Make one optimizer step on the mean of the objective.

        Pairs: mean over prompts of the mean over their pairs; labels: mean over responses.
        """
        total = self.loss_denominator(sum_scalars(self.batch_adapter.weight(part).sum() for part in batch))
        terms = self.batch_adapter.batch_terms(self.policy, list(batch))
        for index, part in enumerate(batch):
            losses, metrics = self.batch_adapter.losses(self.policy, part, terms, index)
            if self.updates_done == 0 and self.starts_at_reference:
                self.check_start(metrics["reference_gap"])
            self.backward_mean(losses, self.batch_adapter.weight(part), total, metrics)
            self.count(len(part.tokens), part.tokens.attention_mask.sum())
        # Without anything to compare, momentum alone must not move the policy.
        self.record(self.step(frozen=None if self.batch_adapter.has_gradient(list(batch)) else self.policy))

    def check_start(self, gap: torch.Tensor) -> None:
        """Raise RunFailed if policy and reference differ at step 0.

        They are the same model there, so every log-ratio is 0 and DPO's loss is log 2. Checked in exact arithmetic
        only.
        """
        if self.trainer.precision in ("32-true", "64-true") and gap.max() > 1e-2:
            raise RunFailed(
                f"policy and reference differ by {gap.max():.2g} nats before the first update, though the reference is "
                "the policy as it starts",
                fix="check the model for dropout, for outputs that depend on padding, and for a resumed adapter",
            )

    def prompts_to_show(self) -> list[Prompt]:
        """Return the prompts of held-out comparisons."""
        return [Prompt(record.prompt, getattr(record, "tags", ())) for record in self.data.validation]

    @torch.no_grad()
    def validation_step(self, batch: Parts[Any], batch_idx: int) -> None:
        """Log loss and metrics on held-out comparisons; the batch that a loss reads is this rank's batch."""
        if not self.batch_adapter.has_gradient(list(batch), across_ranks=False):
            return
        terms = self.batch_adapter.batch_terms(self.policy, list(batch), across_ranks=False)
        for index, part in enumerate(batch):
            losses, metrics = self.batch_adapter.losses(self.policy, part, terms, index)
            for name, values in {"loss": losses, **metrics}.items():
                self.log_mean(f"val/{name}", values, self.batch_adapter.weight(part))


def select_adapter(objective: PairObjective | LabelObjective | ContrastObjective) -> AnyAdapter:
    """Select the batch adapter (pairs, labels or batch-wise contrasts) for an objective."""
    if isinstance(objective, LabelObjective):
        return Labels(objective)
    return Contrasts(objective) if isinstance(objective, ContrastObjective) else Pairs(objective)
