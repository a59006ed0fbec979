"""Models sharded over ranks by FSDP2: each rank keeps a part of every weight, gradient and optimizer state.

A transformer block is gathered for its forward and backward pass and freed after it. Embeddings, last norm and
vocabulary projection form one group, so that tied weights stay one weight. Every pass is collective: all ranks must
make the same number of them, except within ``gathered``.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.data.collate import TokenBatch
from rlhf.models.language_model import LanguageModel
from rlhf.models.precision import Precision
from rlhf.models.scalar import ScalarModel

M = TypeVar("M", LanguageModel, ScalarModel)


def shard(model: LanguageModel | ScalarModel, mesh: DeviceMesh, precision: Precision) -> None:
    """Shard a model over the ranks of a mesh, in place; every rank must hold the same weights.

    Under ``*-mixed`` precision, weights are gathered in 16 bits and the sharded ones stay float32. Gradients are
    averaged over ranks in float32. The heads of a scalar model are a group of their own that is gathered as it is.
    """
    half = MixedPrecisionPolicy(
        param_dtype=precision.compute if precision.is_mixed else None, reduce_dtype=torch.float32
    )
    decoder = model.language_model if isinstance(model, ScalarModel) else model
    for block in [part for part in decoder.modules() if isinstance(part, GradientCheckpointingLayer)]:
        fully_shard(block, mesh=mesh, mp_policy=half)
    fully_shard(decoder, mesh=mesh, mp_policy=half)
    for method in ("hidden", "hidden_at", "step"):
        register_fsdp_forward_method(decoder, method)
    if isinstance(model, ScalarModel):
        fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
        for method in ("_hidden", "last_hidden"):
            register_fsdp_forward_method(model, method)
    # The first pass decides which group is the outermost; later ones may enter a scalar model at its decoder.
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    tokens = TokenBatch.of(ids, torch.ones_like(ids))
    with torch.no_grad():
        if isinstance(model, ScalarModel):
            model.last_hidden(tokens)
        else:
            model.hidden(tokens)
    reshard(model)


def is_sharded(module: nn.Module) -> bool:
    """Return whether a module was sharded by ``shard``."""
    return isinstance(module, FSDPModule)


def reshard(module: nn.Module) -> None:
    """Free the gathered weights of a module, so that its parameters are this rank's shards.

    A pass without gradients leaves the outermost group gathered; after an update these weights would be outdated.
    """
    for part in _groups(module):
        part.reshard()


@contextmanager
def gathered(*modules: nn.Module) -> Iterator[None]:
    """Hold the whole weights of modules on every rank inside the context, in the format they are computed in.

    Entering is collective. Inside, passes make no collective calls, so that ranks may differ in their number: sampling
    ends at another decode step on each rank. Not to be nested around the same module. Does nothing to modules that are
    not sharded.
    """
    for module in modules:
        reshard(module)
        for part in _groups(module):
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
    try:
        yield
    finally:
        for module in modules:
            for part in _groups(module):
                if part is not module:  # the outermost group stays gathered until the backward pass
                    part.set_reshard_after_forward(True, recurse=False)
                part.reshard()


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, which shares its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_value(tensor: Tensor) -> Tensor:
    """Return the whole value of a sharded tensor, which is collective; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_without_weights(model: M) -> M:
    """Return a copy of a model that is not sharded yet, with weights on the meta device: shapes without storage."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, {**empty, id(model.tokenizer): model.tokenizer})


def gather_into(empty: M, model: M, keep: bool) -> None:
    """Fill a copy made by ``copy_without_weights`` with the whole weights of the sharded model, on the CPU.

    Collective. One weight at a time is whole on a device.

    Args:
        empty: The copy.
        model: The sharded model.
        keep: Whether this rank keeps the weights; the copy of other ranks stays empty.
    """
    reshard(model)
    names = {id(parameter): name for name, parameter in empty.named_parameters()}
    whole: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        value = whole_value(parameter.detach())
        if keep:
            whole[name] = nn.Parameter(value.cpu(), parameter.requires_grad)
    if not keep:
        return
    for part in empty.modules():
        for slot, held in part._parameters.items():
            if held is not None:
                part._parameters[slot] = whole[names[id(held)]]
    for name, buffer in model.named_buffers():
        empty.get_buffer(name).data = buffer.cpu()
    if isinstance(model, ScalarModel) and isinstance(empty, ScalarModel):
        empty.log_odds = model.log_odds


def _groups(module: nn.Module) -> Iterable[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]
