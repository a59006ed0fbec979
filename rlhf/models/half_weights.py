"""Lightning precision plugin for 16-bit weights that leaves other tensors unchanged."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pytorch_lightning.plugins import HalfPrecision


class HalfWeights(HalfPrecision):
    """Plugin that casts the weights to 16 bits and leaves everything else unchanged.

    Lightning's own plugin makes 16 bits the default dtype of every tensor created in a step, and casts each batch.
    Uniform random numbers then have 256 values, example weights 3 digits, and log-probabilities cannot be written into
    the record of a rollout.
    """

    def forward_context(self) -> AbstractContextManager[None]:  # type: ignore[override]  # Lightning's is a generator
        """Return a context that changes nothing: a model computes in the format of its weights."""
        return nullcontext()

    def convert_input(self, data: Any) -> Any:
        """Return the batch unchanged."""
        return data
