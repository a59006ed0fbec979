"""Peak memory of a step by phase, computed on fake tensors, and the machine's memory."""

import logging
import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf.data.collate import TokenBatch
from rlhf.functional.logprobs import token_logprobs
from rlhf.inspection.composing import Look
from rlhf.inspection.roles import Role
from rlhf.inspection.work import Work
from rlhf.models.language_model import LanguageModel
from rlhf.models.machine_memory import read_machine_memory
from rlhf.models.packed_weights import packed_bytes
from rlhf.models.padding_free import Layout
from rlhf.models.precision import Precision
from rlhf.models.scalar import ScalarModel
from rlhf.models.weight_casts import kept_casts
from rlhf.stage.base import Stage
from rlhf.stage.supervised import Supervised

UPDATE_COPIES = 2  # copies of the largest weight that an optimizer makes while it updates it (AdamW, one by one)
LOGITS_COPIES = 3  # fp32 copies of one decode step's logits: scaled, normalised, and the random numbers beside them


class AllocationPeak(TorchDispatchMode):
    """Context manager: peak of the bytes of all tensors that are made inside it and alive at the same time.

    Args:
        known: Tensors whose storages do not count, such as weights.

    Attributes:
        live: Bytes that are alive now.
        peak: Most bytes that were alive.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storages of its results."""
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


@dataclass(frozen=True)
class Passes:
    """Memory of the passes of a stage, in bytes, beside the weights.

    Attributes:
        training: Most that one micro-batch needs in its forward and backward pass, gradients included; None if the
            stage trains nothing, or if it cannot be measured.
        unmeasured: Reason why the training pass cannot be measured; "" if it is or if there is none.
        sampling: Keys and values of the largest sampling batch at full length, the logits of one token, and packed
            weights; None without sampling.
    """

    training: int | None
    sampling: int | None
    unmeasured: str = ""


def passes(look: Look, stage: Stage, work: Work, precision: Precision, accelerator: str) -> Passes:
    """Return the memory of the largest training pass and of the largest sampling batch."""
    needed = sampling(stage, work, precision, accelerator)
    if stage._optimizer is None:
        return Passes(None, needed)
    if work.batch is None:
        return Passes(None, needed, "its rows are unknown until the steps before it have run")
    try:
        return Passes(training_pass(look, stage, work, precision), needed)
    except Exception as error:  # an architecture that reads values, which fake tensors do not have, in code of any kind
        lines = str(error).strip().splitlines() or [""]
        return Passes(None, needed, f"it does not run on fake tensors ({type(error).__name__}: {lines[0][:80]})")


def peak(roles: Sequence[Role], measured: Passes) -> int:
    """Return the most bytes that weights, gradients, optimizer state, activations and caches need at a time."""
    weights = sum(role.weights for role in roles if not role.offloaded)
    offloaded = [role for role in roles if role.offloaded]  # the reference scores alone, and the reward models do
    scoring = [
        sum(role.weights for role in offloaded if (role.name == "reference") is is_reference)
        for is_reference in (True, False)
    ]
    state = sum(role.optimizer for role in roles)
    update = sum(role.gradients for role in roles) + UPDATE_COPIES * max(role.largest for role in roles)
    return weights + state + max(measured.training or 0, measured.sampling or 0, update, *scoring)


def training_pass(look: Look, stage: Stage, work: Work, precision: Precision) -> int:
    """Return the most bytes that the forward and backward pass of the largest micro-batch needs beside the weights.

    It is run on fake tensors: the decoder on the distinct tokens of the batch, the log-probabilities of its targets in
    chunks, and the backward pass, which makes the gradients. Where gradients of an earlier pass are kept (several
    micro-batches, pretraining text), the pass is run twice.

    Args:
        look: Source of the fake weights.
        stage: A stage that trains.
        work: Its amounts, with a batch.
        precision: Precision of the pass.

    Raises:
        Exception: Of any kind: the architecture reads values, which fake tensors do not have.
    """
    assert work.batch is not None
    modules = stage.modules_trained()
    order = [(modules, _Pass.of(modules[0], work.batch, isinstance(stage, Supervised)))] * min(work.accumulation, 2)
    if work.text is not None:
        order.append(([stage.policy], _Pass.of(stage.policy, work.text, uniform=True)))
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # logs the traceback of an error that is reported here
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    known = [value for module in modules for value in [*module.parameters(), *module.buffers()]]
    known += [copy for module in modules for copy in kept_casts(module, precision.compute)]
    try:
        with look.weights.mode, precision.autocast("cpu"), AllocationPeak(known) as allocated:
            for trained, tokens in order:
                torch.stack([tokens.loss(module) for module in trained]).sum().backward()
    finally:
        logger.setLevel(level)
        for module in modules:
            module.zero_grad(set_to_none=True)
    return allocated.peak


@dataclass(frozen=True)
class _Pass:
    """Tokens of a forward pass: B rows of T tokens, or a layout of the distinct ones."""

    shape: torch.Size  # (B, T)
    layout: Layout | None
    targets: int
    uniform: bool  # whether the loss is a mean of log-probabilities

    @classmethod
    def of(cls, model: nn.Module, batch: TokenBatch, uniform: bool) -> "_Pass":
        return cls(batch.ids.shape, _language_model(model).layout(batch), int(batch.loss_mask.sum()), uniform)

    def loss(self, model: nn.Module) -> Tensor:
        """Return a loss that needs the memory of a real one, a scalar."""
        language_model = _language_model(model)
        if self.layout is None:
            ids = torch.zeros(self.shape, dtype=torch.long)
            output = language_model.base.get_decoder()(input_ids=ids, use_cache=False)
            states = output.last_hidden_state.flatten(0, 1)
        else:
            states = language_model.distinct_hidden(self.layout)
        if isinstance(model, ScalarModel):
            return model.project(states).sum()
        rows, targets = states[: self.targets], torch.zeros(self.targets, dtype=torch.long)
        head = language_model.base.get_output_embeddings()
        return token_logprobs(rows, targets, head, uniform=self.uniform)[0].sum()


def _language_model(model: nn.Module) -> LanguageModel:
    found = model.language_model if isinstance(model, ScalarModel) else model
    assert isinstance(found, LanguageModel)
    return found


def sampling(stage: Stage, work: Work, precision: Precision, accelerator: str) -> int | None:
    """Return the bytes of sampling: keys and values of the largest batch at full length, a token's logits, and copies.

    The copies are those of large weights on a CPU (``rlhf.models.packed_weights``).
    """
    sampler = getattr(stage, "sampler", None)
    if sampler is None or stage.policy is None:
        return None
    config = stage.policy.config
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    rows = min(max(1, sampler.batch_size // sampler.samples), stage.batch_size) * sampler.samples
    prompts = rows // sampler.samples if stage.policy.padding_free else rows  # a prompt is kept once for its rows
    tokens = prompts * work.prompt_length + rows * sampler.room(stage.policy)
    kept = 2 * int(config.num_hidden_layers) * heads * width * precision.compute.itemsize * tokens
    packed = packed_bytes(stage.policy) if accelerator == "cpu" and precision.compute == torch.float32 else 0
    return kept + packed + LOGITS_COPIES * 4 * rows * int(config.vocab_size)


def machine(accelerator: str) -> tuple[int | None, str]:
    """Return (bytes of memory that training may use, name of the device); None for a device that is absent."""
    if accelerator == "cpu":
        return read_machine_memory(), "this machine"
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0)
    return None, "no GPU on this machine"


def libraries(accelerator: str) -> int:
    """Return the resident bytes of this process, of Python, its libraries and the data; 0 on a GPU, which has none."""
    if accelerator != "cpu":
        return 0
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def size(count: int | None) -> str:
    """Return a number of bytes with a binary unit; "-" for 0, "?" for None."""
    if count is None:
        return "?"
    if not count:
        return "-"
    value, units = float(count), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while value >= 1024 and unit != "GiB":
        value, unit = value / 1024, next(units)
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"
