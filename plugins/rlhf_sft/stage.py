"""Supervised fine-tuning: next-token prediction on the assistant's turns, and only on those."""

from collections.abc import Mapping
from typing import Any, ClassVar

from rlhf.data.records import Prompt
from rlhf.stage.supervised import Supervised


class SFTStage(Supervised):
    """Stage with a loss on the assistant's tokens and the end-of-turn token after them, not on prompts.

    Its hyperparameters are those of ``Supervised``: ``batch_size`` is in dialogues, or in packed rows.
    """

    shardable = True
    defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 32, "epochs": 2}

    def prompts_to_show(self) -> list[Prompt]:
        """Return the prompts of the last responses of held-out demonstrations."""
        dialogues = [record.messages for record in self.data.validation]
        return [
            Prompt(messages[:-1]) for messages in dialogues if len(messages) > 1 and messages[-1].role == "assistant"
        ]
