"""Copy of a policy's weights in another format, for a sampler that does not sample from the policy itself."""

import copy

import torch

from rlhf.models.language_model import LanguageModel


class WeightCopy:
    """Copy of a policy in a 16-bit format; its buffers (rotary frequencies) keep theirs.

    Args:
        dtype: Format of the weights.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._source: LanguageModel | None = None
        self._copy: LanguageModel | None = None

    @torch.no_grad()
    def of(self, policy: LanguageModel) -> LanguageModel:
        """Return the copy with the policy's present weights; it is built at the first call.

        The weights are copied at every call: reading them takes far less time than one decode step, and nothing else
        shows with certainty that they have not changed.
        """
        if self._copy is None or self._source is not policy:
            # The copy has no part in a shared base, whose other roles must not be copied with it.
            self._copy = copy.deepcopy(policy, {id(policy.shared): None}).frozen().to(self.dtype)
            self._source = policy
        for own, source in zip(self._copy.parameters(), policy.parameters(), strict=True):
            own.copy_(source)
        return self._copy
