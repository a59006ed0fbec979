"""Sharding of a stage's models under `trainer=fsdp`, and their whole weights after the training."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytorch_lightning as pl
from torch import nn

from rlhf.models.language_model import LanguageModel
from rlhf.models.precision import Precision
from rlhf.models.reference import Reference
from rlhf.models.scalar import ScalarModel
from rlhf.models.sharding import copy_without_weights, gather_into, gathered, is_sharded, shard
from rlhf.stage.sharded_strategy import ShardedStrategy


class ShardedModels(pl.LightningModule):
    """Part of a stage that shards the trained models and the reference; models of rewards stay whole on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self._empty: dict[str, LanguageModel | ScalarModel] = {}  # attribute -> copy that receives the whole weights
        self._validation = ExitStack()

    def modules_trained(self) -> Sequence[nn.Module]:
        """Return the modules whose parameters the optimizer updates."""
        raise NotImplementedError

    def roles(self) -> dict[str, Any]:
        """Return the models that the stage holds, by role: modules or references."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """Shard the models over all ranks under `trainer=fsdp`; otherwise do nothing."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, ShardedStrategy) or self._empty:
            return
        trained = [(name, model) for name, model in self.named_children() if model in self.modules_trained()]
        self._empty = {name: copy_without_weights(model) for name, model in trained}  # type: ignore[type-var,misc]
        mesh, precision = strategy.device_mesh["data_parallel"], Precision(self.trainer.precision)  # type: ignore[arg-type]
        for model in self._models_to_shard():
            if not is_sharded(model):  # a reference may be the policy with its adapter off
                shard(model, mesh, precision)

    def _models_to_shard(self) -> Iterator[LanguageModel | ScalarModel]:
        yield from self.modules_trained()  # type: ignore[misc]
        yield from (role.modules[0] for role in self.roles().values() if isinstance(role, Reference))

    def make_whole(self) -> None:
        """Replace the sharded models by ordinary ones with whole weights, on the first rank alone. Collective."""
        for name, empty in self._empty.items():
            gather_into(empty, getattr(self, name), keep=self.trainer.is_global_zero)
            if self.trainer.is_global_zero:
                setattr(self, name, empty)
        self._empty = {}

    def enter_validation(self, context: ExitStack) -> None:
        """Enter the contexts in which the stage validates: ranks may make different numbers of passes."""
        references = [role for role in self.roles().values() if isinstance(role, Reference)]
        models = {id(x): x for x in (*self.modules_trained(), *(role.modules[0] for role in references))}
        context.enter_context(gathered(*models.values()))

    def on_validation_epoch_start(self) -> None:
        """Hold the whole weights during the validation."""
        super().on_validation_epoch_start()
        self.enter_validation(self._validation)

    def on_validation_epoch_end(self) -> None:
        """Free the whole weights."""
        super().on_validation_epoch_end()
        self._validation.close()
