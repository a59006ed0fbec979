"""Strategy of `trainer=fsdp`: FSDP2 through Lightning, with checkpoints of one file per rank."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from rlhf.errors import UserError, key
from rlhf.models.sharding import local_shard
from rlhf.storage import checkpoint_files, manifest
from rlhf.storage.files import sync_folder


class ShardedStrategy(ModelParallelStrategy):  # type: ignore[misc]
    """Strategy that shards weights, gradients and optimizer state over all ranks; stages apply the sharding.

    A checkpoint is a directory with a file of each rank's shards and a manifest. It gets its name when it is complete.
    """

    def __init__(self) -> None:
        super().__init__()  # without Lightning's arguments: the sizes of the mesh follow from the ranks

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Return whether weights are restored after `on_fit_start`: no, stages prepare with the restored ones."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Return whether Lightning loads the optimizers' states of a checkpoint."""
        return True

    def setup_environment(self) -> None:
        """Start the process group and build a mesh of one dimension in which every rank has its own data."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the stage's state, of which sharded weights are this rank's shards."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's state on this rank."""
        return optimizer.state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the shards of all ranks; `filepath` is a complete directory or absent. Collective."""
        path = Path(self.broadcast(filepath))
        scratch = path.with_name(f".{path.name}")
        if self.is_global_zero:
            for old in (scratch, path):
                checkpoint_files.remove(old)
            scratch.mkdir(parents=True)
        self.barrier()
        own = tree_map_only(DTensor, local_shard, checkpoint)
        self.checkpoint_io.save_checkpoint(own, scratch / _file(self.global_rank), storage_options)
        self.barrier()
        if self.is_global_zero:
            manifest.write(scratch, scratch.glob("*.ckpt"))
            sync_folder(scratch)
            scratch.rename(path)
            sync_folder(path.parent)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read this rank's file of a checkpoint.

        Raises:
            UserError: It was written by another number of ranks.
        """
        path = Path(checkpoint_path)
        ranks = len(list(path.glob("*.ckpt")))
        if ranks != self.world_size:
            raise UserError(
                f"{path} holds the shards of {ranks} ranks and the run has {self.world_size}",
                fix=f"type {key('trainer.devices', ranks)}",
                option="trainer.devices",
                value=self.world_size,
            )
        return self.checkpoint_io.load_checkpoint(path / _file(self.global_rank), weights_only=weights_only)

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copy the shards of a checkpoint into the stage's weights."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        for name, value in checkpoint["state_dict"].items():
            local_shard(own[name]).copy_(value)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizers' states, whose tensors of a weight's shape become shards of it again."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                index: {name: _as_shard(value, parameters[index]) for name, value in entry.items()}
                for index, entry in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def _file(rank: int) -> str:
    return f"rank={rank}.ckpt"


def _as_shard(value: Any, parameter: Tensor) -> Any:
    """Return the state of a sharded parameter as a shard; numbers of the whole parameter (steps) stay as they are."""
    if not (isinstance(value, Tensor) and value.ndim and isinstance(parameter, DTensor)):
        return value
    return DTensor.from_local(
        value.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
