"""Pretraining: next-token prediction on every token of plain text."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from rlhf.data.split import Split
from rlhf.models.language_model import LanguageModel
from rlhf.objective import TokenObjective
from rlhf.stage.checks import check_context
from rlhf.stage.supervised import Supervised
from rlhf.stage.update import Optimizer, Schedule


class PretrainStage(Supervised):
    """Stage of pretraining on documents packed into rows of ``context`` tokens; a document attends only to itself.

    Args:
        context: Tokens in a row.
        hyperparameters: Those of ``Supervised``: ``batch_size`` and ``micro_batch_size`` are in rows.
    """

    shardable = True
    defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 8, "epochs": 2}
    fixed = ("packing",)

    def __init__(
        self,
        model: LanguageModel,
        objective: TokenObjective,
        data: Split,
        optimizer: Optimizer,
        scheduler: Schedule,
        *,
        context: Annotated[int, Field(gt=1)] = 128,
        **hyperparameters: Any,
    ) -> None:
        check_context(model, context, "stage.context")
        super().__init__(model, objective, data, optimizer, scheduler, packing=context, **hyperparameters)
