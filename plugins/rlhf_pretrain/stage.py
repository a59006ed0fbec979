"""Pretraining: next-token prediction on every token of plain text."""

from typing import Annotated

from pydantic import Field

from rlhf.data.split import Split
from rlhf.models.language_model import LanguageModel
from rlhf.objective import TokenObjective
from rlhf.stage.supervised import Supervised
from rlhf.stage.update import Optimizer, Schedule


class PretrainStage(Supervised):
    """Stage of pretraining on documents packed into rows of ``context`` tokens; a document attends only to itself.

    Args:
        batch_size: Rows per update.
        micro_batch_size: Rows per forward pass, null: all.
        gradient_clip: Largest gradient norm, null: none.
        epochs: Passes over the text.
        context: Tokens in a row.
    """

    def __init__(
        self,
        model: LanguageModel,
        objective: TokenObjective,
        data: Split,
        optimizer: Optimizer,
        scheduler: Schedule,
        *,
        batch_size: Annotated[int, Field(gt=0)] = 8,
        micro_batch_size: Annotated[int, Field(gt=0)] | None = None,
        gradient_clip: Annotated[float, Field(gt=0)] | None = 1.0,
        epochs: Annotated[float, Field(gt=0)] = 2,
        context: Annotated[int, Field(gt=1)] = 128,
    ) -> None:
        super().__init__(
            model,
            objective,
            data,
            optimizer,
            scheduler,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            gradient_clip=gradient_clip,
            epochs=epochs,
            packing=context,
        )
