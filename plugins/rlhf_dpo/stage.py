"""Direct preference optimisation and its family: the policy learns from comparisons without a reward model."""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field

from rlhf.data.data import Split
from rlhf.data.records import Prompt
from rlhf.errors import RunFailed, UserError
from rlhf.models.language_model import LanguageModel, Reference
from rlhf.models.roles import reference_of
from rlhf.objective import ContrastObjective, LabelObjective, PairObjective
from rlhf.progress import work_of
from rlhf.stage import Optimizer, Parts, Schedule, Stage, chunks
from rlhf.supervised import sum_of
from rlhf.vocabulary import check_vocabulary
from rlhf_dpo.contrasts import Contrasts
from rlhf_dpo.embedding import embed_prompts
from rlhf_dpo.labels import Labels
from rlhf_dpo.pairs import Pairs


class DPOStage(Stage):
    """Any loss on pairs of replies (``PairObjective``) or on labelled ones (``LabelObjective``, ``ContrastObjective``).

    Reference log-probabilities and embeddings are computed once, before training, from the very tokens that are
    trained on; the reference is then dropped.

    Args:
        batch_size: Prompts per update (labelled replies, for a loss on those).
        micro_batch_size: Of these per forward pass, null: all.
        gradient_clip: Largest gradient norm, null: none.
        epochs: Times each comparison is seen.
        reference: Model that log-ratios are measured against, null: the policy as it starts.
    """

    telling = ("loss", "accuracy", "val/accuracy")
    headline = "val/accuracy"
    keeps_reference = False  # it reads the data once
    models_beside = {"reference": False}

    def __init__(
        self,
        model: LanguageModel,
        objective: PairObjective | LabelObjective | ContrastObjective,
        data: Split,
        optimizer: Optimizer,
        scheduler: Schedule,
        *,
        batch_size: Annotated[int, Field(gt=0)] = 64,
        micro_batch_size: Annotated[int, Field(gt=0)] | None = None,
        gradient_clip: Annotated[float, Field(gt=0)] | None = 1.0,
        epochs: Annotated[float, Field(gt=0)] = 1,
        reference: str | None = None,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            scheduler,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            gradient_clip=gradient_clip,
        )
        self.check_parts(objective=objective, batch_size=batch_size, reference=reference)
        self.kind = kind_of(objective)
        self.data, self.epochs = self.kind.records(data), epochs
        self.policy.disable_dropout()
        self.starts_at_reference = self.kind.needs_reference and reference is None
        self.reference: Reference | None = None
        if self.kind.needs_reference:
            self.reference = reference_of(model, reference)

    def roles(self) -> dict[str, Any]:
        """The reference too, which is there until it has read the data."""
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
        """As ``Stage.check_parts``."""
        super().check_parts(batch_size=batch_size, **parts)
        check_vocabulary(model, reference, "inputs.reference", "inputs.reference=null (the policy as it starts)")
        if objective is None:
            return
        kind = kind_of(objective)
        kind.check_records(record)
        kind.check_batch(batch_size)
        if reference is not None and not kind.needs_reference:
            raise UserError(f"inputs.reference={reference}: this objective has no reference; leave it out")

    def read_examples(self) -> None:
        """Tokenises the data."""
        self.encode(self.data, self.policy.tokenizer)
        self.check_lengths()
        longest = min(self.policy.context_length, self.data.data.max_length)
        self.examples = self.kind.complete(self.examples, longest, training=True)
        self.held_out = self.kind.complete(self.held_out, longest, training=False)
        self.batches = self.order([len(example) for example in self.examples], epochs=self.epochs)

    def prepare(self) -> None:
        """Reads the data and lets the reference read each reply once."""
        self.read_examples()
        if self.kind.embedding is not None:
            pooling, encoder = self.kind.embedding
            self.examples = embed_prompts(self.examples, self.reference, self.policy, pooling, encoder, self.batch_size)
            self.held_out = embed_prompts(self.held_out, self.reference, self.policy, pooling, encoder, self.batch_size)
        if self.reference is not None:
            self.reference.to(self.device)
            self.examples = self.with_reference(self.examples)
            self.held_out = self.with_reference(self.held_out)
            self.reference = None  # all it has to say is written down; a copy of the model is free again

    def check_lengths(self) -> None:
        """Refuses rows that the model's context cannot hold."""
        longest = max(len(example) for example in [*self.examples, *self.held_out])
        context = self.policy.context_length
        if longest > context:
            raise UserError(
                f"the longest prompt and reply have {longest} tokens, the model's context holds {context}: "
                f"type data.max_length={context}"
            )

    def with_reference(self, examples: Sequence[Any]) -> list[Any]:
        """The examples with the reference's log-probability of every reply."""
        assert self.reference is not None
        done: list[Any] = []
        with work_of(self, "reference", len(examples), "row") as meter:
            for rows in chunks(len(examples), self.micro_batch_size or self.batch_size):
                chosen = list(examples[rows])
                part = self.collate(chosen).to(self.device)
                logp = [self.reference.logprobs(*inputs).sum(dim=1).tolist() for inputs in self.kind.read(part)]
                done += self.kind.with_reference(chosen, *logp)
                meter.advance(len(chosen))
        return done

    def collate(self, examples: list[Any]) -> Any:
        """A micro-batch of examples as tensors."""
        return self.kind.collate(examples, self.policy.pad_id)

    def training_step(self, batch: Parts[Any], batch_idx: int) -> None:
        """Pairs: mean over prompts of the mean over their pairs of the objective; labels: mean over replies."""
        total = self.total(sum_of(self.kind.weight(part).sum() for part in batch))
        around = self.kind.around(self.policy, list(batch))
        for index, part in enumerate(batch):
            losses, metrics = self.kind.losses(self.policy, part, around, index)
            if self.updates_done == 0 and self.starts_at_reference:
                self.check_start(metrics["reference_gap"])
            self.backward_mean(losses, self.kind.weight(part), total, metrics)
            self.count(len(part.tokens), part.tokens.attention_mask.sum())
        # Where there was nothing to compare, momentum alone must not move the policy.
        self.record(self.step(frozen=None if self.kind.teaches(list(batch)) else self.policy))

    def check_start(self, gap: torch.Tensor) -> None:
        """At step 0 policy and reference are the same model, so every log-ratio is 0 and DPO's loss is log 2."""
        if self.trainer.precision in ("32-true", "64-true") and gap.max() > 1e-2:
            raise RunFailed(
                f"policy and reference differ by {gap.max():.2g} nats before the first update, though the reference is "
                "the policy as it starts: dropout, padding or a resumed adapter makes them differ"
            )

    def prompts_to_show(self) -> list[Prompt]:
        """Prompts of held-out comparisons."""
        return [Prompt(record.prompt, getattr(record, "tags", ())) for record in self.data.validation]

    @torch.no_grad()
    def validation_step(self, batch: Parts[Any], batch_idx: int) -> None:
        """The same on held-out comparisons; what a loss reads of the batch around is this process's batch."""
        if not self.kind.teaches(list(batch), together=False):
            return
        around = self.kind.around(self.policy, list(batch), together=False)
        for index, part in enumerate(batch):
            losses, metrics = self.kind.losses(self.policy, part, around, index)
            for name, values in {"loss": losses, **metrics}.items():
                self.log_mean(f"val/{name}", values, self.kind.weight(part))


def kind_of(objective: PairObjective | LabelObjective | ContrastObjective) -> Any:
    """What knows the examples and batches of an objective; what passes through the stage is of one kind throughout."""
    if isinstance(objective, LabelObjective):
        return Labels(objective)
    return Contrasts(objective) if isinstance(objective, ContrastObjective) else Pairs(objective)
