"""Lightning's precision plugin for 16-bit weights, narrowed to the weights."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pytorch_lightning.plugins import HalfPrecision


class HalfWeights(HalfPrecision):
    """Plugin that casts the weights to 16 bits and leaves all else as it is.

    Lightning's own makes 16 bits the default of every tensor that is created in a step, and casts each batch. Uniform
    numbers then have 256 values, the weights of examples 3 digits, and log-probabilities cannot be written into the
    record of a rollout.
    """

    def forward_context(self) -> AbstractContextManager[None]:  # type: ignore[override]  # Lightning's is a generator
        """Return a context that changes nothing: a model computes in the format of its weights."""
        return nullcontext()

    def convert_input(self, data: Any) -> Any:
        """Return the batch as it is."""
        return data
