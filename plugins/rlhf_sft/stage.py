"""Supervised fine-tuning: next-token prediction on the assistant's turns, and only on those."""

from typing import Annotated

from pydantic import Field

from rlhf.data.records import Prompt
from rlhf.data.split import Split
from rlhf.models.language_model import LanguageModel
from rlhf.objective import TokenObjective
from rlhf.stage.supervised import Supervised
from rlhf.stage.update import Optimizer, Schedule


class SFTStage(Supervised):
    """Stage with a loss on the assistant's tokens and the end-of-turn token after them, not on prompts.

    Args:
        batch_size: Dialogues (or packed rows) per update.
        micro_batch_size: Rows per forward pass, null: all.
        gradient_clip: Largest gradient norm, null: none.
        epochs: Passes over the demonstrations.
        packing: Tokens in a row of several dialogues; null: one dialogue per row, padded.
    """

    def __init__(
        self,
        model: LanguageModel,
        objective: TokenObjective,
        data: Split,
        optimizer: Optimizer,
        scheduler: Schedule,
        *,
        batch_size: Annotated[int, Field(gt=0)] = 32,
        micro_batch_size: Annotated[int, Field(gt=0)] | None = None,
        gradient_clip: Annotated[float, Field(gt=0)] | None = 1.0,
        epochs: Annotated[float, Field(gt=0)] = 2,
        packing: Annotated[int, Field(gt=1)] | None = None,
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
            packing=packing,
        )

    def prompts_to_show(self) -> list[Prompt]:
        """Return the prompts of the last responses of held-out demonstrations."""
        dialogues = [record.messages for record in self.data.validation]
        return [
            Prompt(messages[:-1]) for messages in dialogues if len(messages) > 1 and messages[-1].role == "assistant"
        ]
