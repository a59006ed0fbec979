"""Models that a stage holds during training, and their memory: weights, gradients, optimizer state."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rlhf.inspection.composing import Look
from rlhf.models.fake_tensors import sizes, use_fake_weights
from rlhf.models.language_model import LanguageModel
from rlhf.models.optimizer_state import StateSize
from rlhf.models.reference import Reference
from rlhf.models.scalar import ScalarModel
from rlhf.stage.base import Stage

NAMES = {"scorer": "reward model"}
DEEPEST = 4  # maximum depth of the search for models in nested rewards


@dataclass(frozen=True)
class Role:
    """Model of a stage. Bytes and counts exclude weights shared with an earlier role, so that these count once."""

    name: str
    parameters: int
    trained: int
    weights: int  # bytes, buffers included
    gradients: int  # bytes
    optimizer: int  # bytes
    note: str = ""
    largest: int = 0  # bytes of the largest trained weight
    offloaded: bool = False  # whether it is on the device only while it scores

    @property
    def total(self) -> int:
        """Return the bytes of weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer

    def shard(self, ranks: int) -> "Role":
        """Return the role with the bytes that each of the ranks holds under `trainer=fsdp`; rewards stay whole."""
        if not (self.trained or self.name in ("reference", "EMA")):
            return self
        weights, gradients, optimizer = (-(-size // ranks) for size in (self.weights, self.gradients, self.optimizer))
        note = ", ".join([*([self.note] if self.note else []), f"1/{ranks} on each rank"])
        return replace(self, weights=weights, gradients=gradients, optimizer=optimizer, note=note)


def roles_of(look: Look, stage: Stage) -> list[Role]:
    """Return every model of a stage that was built without weights by ``look``; the trained ones first."""
    seen: set[int] = set()
    state = StateSize(stage._optimizer)
    found = []
    groups = stage.offloadable().values() if getattr(stage, "offload_frozen", False) else ()  # type: ignore[operator]
    offloaded = {id(model) for models in groups for model in models}
    for name, module in stage.named_children():
        if isinstance(module, LanguageModel | ScalarModel):
            found.append(_role(NAMES.get(name, name), module, seen, state))
    with use_fake_weights(look.weights):  # some stages build a model only here
        held = list(_held(stage))
    for name, model in held:
        note = ""
        reference: Any = vars(stage).get("reference")
        if name == "reference" and isinstance(reference, Reference):
            if reference.shared:
                note = "the policy's base, adapter off"
            elif not stage.keeps_reference:
                note = "read once, freed before training"
        elif name == "sampler":
            note = "while it samples, and after training"
        elif name == "start":
            note = "model that sampled, to measure KL after training"
        role = _role(name, model, seen, None, note)
        if id(model) in offloaded:
            role = replace(role, offloaded=True, note="on the device while it scores")
        found.append(role)
    if getattr(getattr(stage, "sampler", None), "precision", None) == "bf16":
        count = sum(value.numel() for value in stage.policy.parameters())
        buffers = sum(value.numel() * value.element_size() for value in stage.policy.buffers())
        found.append(Role("sampler copy", count, 0, 2 * count + buffers, 0, 0, "bfloat16, renewed before each rollout"))
    if getattr(stage, "ema_decay", None) is not None:
        count = sum(value.numel() for value in stage.policy.trainable_parameters())
        found.append(Role("EMA", count, 0, 4 * count, 0, 0, "float32"))
    return found


def _role(name: str, module: nn.Module, seen: set[int], state: StateSize | None, note: str = "") -> Role:
    new = {id(value): value for value in module.parameters() if value.requires_grad and id(value) not in seen}
    parameters, trained, weights = sizes(module, seen)
    if state is None:
        return Role(name, parameters, 0, weights, 0, 0, note)
    gradients = sum(value.numel() * value.element_size() for value in new.values()) if state.trains else 0
    optimizer = state.of(new.values())
    largest = max((value.numel() * value.element_size() for value in new.values()), default=0) if state.trains else 0
    return Role(name, parameters, trained if state.trains else 0, weights, gradients, optimizer, note, largest)


def _held(stage: Stage) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, model) of the frozen models that a stage holds outside its modules: reference, rewards, judges."""
    own = set(map(id, stage.modules()))
    for name, value in vars(stage).items():
        for path, model in _models(value, name, DEEPEST):
            if id(model) not in own:
                own |= {id(model)} if name == "start" else set()
                yield path, model
            elif name == "reference":
                yield path, nn.Module()
    if hasattr(stage, "sampling_reference"):
        sampler: nn.Module = stage.sampling_reference().modules[0]  # type: ignore[operator]
        if id(sampler) not in own:
            yield ("start" if stage.is_on_policy else "sampler"), sampler


def _models(value: Any, path: str, depth: int) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, LanguageModel | ScalarModel):
        yield path.removesuffix(".model").removesuffix("._model"), value
    elif isinstance(value, dict) and depth:
        for key, inner in value.items():
            yield from _models(inner, f"{path}.{key}", depth - 1)
    elif depth and type(value).__module__.partition(".")[0] not in ("builtins", "torch", "pytorch_lightning"):
        for key, inner in getattr(value, "__dict__", {}).items():
            if not isinstance(inner, torch.Tensor) and not path.startswith("_"):
                yield from _models(inner, f"{path}.{key}", depth - 1)
