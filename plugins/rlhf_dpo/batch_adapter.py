"""Interface between the DPO stage and the losses of its three kinds of examples."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

from rlhf.data.split import Split
from rlhf.models.language_model import LanguageModel
from rlhf.models.reference_cache import Row
from rlhf.objective import Metrics

Example = TypeVar("Example")  # an encoded record
Batch = TypeVar("Batch")  # examples as tensors, with their tokens in `tokens`
Terms = TypeVar("Terms")  # quantities of a whole batch


class BatchAdapter(ABC, Generic[Example, Batch, Terms]):
    """Adapter of one kind of objective: its records, micro-batches, reference log-probabilities and losses."""

    #: whether the reference model is read
    needs_reference = True

    def __init__(self, objective: Any) -> None:
        self.objective = objective

    @property
    def embedding(self) -> tuple[str, str | None] | None:
        """Pooling and encoder of the prompts' embeddings; None if the objective reads none."""
        if not getattr(self.objective, "needs_prompt_embedding", False):
            return None
        return getattr(self.objective, "pooling", "mean"), getattr(self.objective, "encoder", None)

    @abstractmethod
    def read_records(self, data: Split) -> Split:
        """Return the records that the objective reads.

        Raises:
            UserError: The data holds other records, or records that the objective cannot read.
        """

    @abstractmethod
    def check_records(self, name: str | None) -> None:
        """Raise UserError for a record type that the objective cannot read; None passes."""

    def check_batch_size(self, batch_size: int) -> None:
        """Raise UserError for a batch too small for the objective; any size passes by default."""

    def add_mismatched(self, examples: Sequence[Example], longest: int, training: bool) -> list[Example]:
        """Return the examples with the responses to other prompts that the objective reads; none by default.

        Args:
            examples: The training examples, or the held-out ones.
            longest: Most tokens of a prompt and a response.
            training: Whether these are the training examples.
        """
        return list(examples)

    @abstractmethod
    def collate(self, examples: list[Example], pad_id: int) -> Batch:
        """Return a micro-batch of examples as tensors."""

    @abstractmethod
    def reference_rows(self, example: Example) -> list[Row]:
        """Return the prompts and responses of an example whose reference log-probabilities the loss reads."""

    @abstractmethod
    def with_reference(self, example: Example, logps: list[float]) -> Example:
        """Return the example with the reference's log-probabilities of its ``reference_rows``."""

    @abstractmethod
    def weight(self, part: Batch) -> Tensor:
        """Return the weight of each loss of a micro-batch, [N]."""

    def has_gradient(self, parts: list[Batch], across_ranks: bool = True) -> bool:
        """Return whether the losses of a batch depend on the policy; True by default."""
        return True

    @abstractmethod
    def batch_terms(self, policy: LanguageModel, parts: list[Batch], across_ranks: bool = True) -> Terms:
        """Return the quantities of the whole batch that the loss of each micro-batch needs.

        Args:
            policy: The trained model.
            parts: This rank's micro-batches.
            across_ranks: Whether the batch includes all ranks; every rank must then call this method.
        """

    @abstractmethod
    def losses(self, policy: LanguageModel, part: Batch, terms: Terms, index: int) -> tuple[Tensor, Metrics]:
        """Return the losses of a micro-batch and its metrics, [N] each.

        Args:
            policy: The trained model.
            part: The micro-batch.
            terms: Result of ``batch_terms``.
            index: Number of the micro-batch.
        """


AnyAdapter = BatchAdapter[Any, Any, Any]
