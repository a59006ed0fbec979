"""Reference policy: the frozen policy that KL is measured against."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from rlhf.data.collate import TokenBatch
from rlhf.models.language_model import LanguageModel
from rlhf.models.module_state import evaluating
from rlhf.models.peft_types import is_peft_model


class Reference:
    """Frozen policy. Deliberately not an ``nn.Module``: no optimizer, checkpoint or parameter count includes it.

    Args:
        model: A frozen model, or a model with an adapter, which is evaluated with the adapter off.
        shared: Whether its weights are the trained model's. True: it has its own modules around shared weights. None:
            it is shared if ``model`` has an adapter, and is then that model with the adapter off.
    """

    def __init__(self, model: LanguageModel, shared: bool | None = None) -> None:
        self._model = model
        self._switched = shared is None and model.adapted
        self.shared = self._switched if shared is None else shared

    @property
    def modules(self) -> tuple[LanguageModel, bool]:
        """Return the model that holds its weights, and whether the trained adapter on that model is excluded."""
        return self._model, self._switched

    @contextmanager
    def active(self) -> Iterator[LanguageModel]:
        """Yield the reference as a LanguageModel in eval mode, without gradients, adapter off inside the context."""
        model = self._model
        on = is_peft_model(model.model) and self._switched
        switch = model.model.disable_adapter() if on else nullcontext()  # type: ignore[operator]
        with torch.no_grad(), evaluating(model), switch:
            yield model

    def to(self, device: torch.device | str) -> "Reference":
        """Move the weights, unless the reference is the trained model itself; shared weights move for both."""
        if not self._switched:
            self._model.to(device)
        return self

    def logprobs(self, tokens: TokenBatch, temperature: float = 1.0) -> Tensor:
        """Compute log-probabilities [B, T] as ``LanguageModel.logprobs`` does, without gradients."""
        if self._model.device != tokens.ids.device:
            self.to(tokens.ids.device)
        with self.active() as model:
            return model.logprobs(tokens, temperature)[0]


def start_reference(policy: LanguageModel) -> Reference:
    """Return the policy as it is before training, frozen.

    With an adapter, this is the base with the adapter off, without extra memory: an adapter is always put freshly on
    the starting policy (earlier adapters were merged when they were saved), so the base *is* the starting policy. On a
    shared base, it is that base with the frozen adapters of the starting policy, if any. Without an adapter, it is a
    copy.
    """
    if policy.shared is not None:
        return Reference(policy.shared.restore_start(policy), shared=True)
    if policy.adapted:
        return Reference(policy)
    return Reference(copy.deepcopy(policy).frozen())
