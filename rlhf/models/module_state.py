"""State of modules: training mode within a context, and gradients after a backward pass."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from rlhf.errors import RunFailed


def evaluating(module: nn.Module) -> AbstractContextManager[None]:
    """Switch a module to eval mode inside the context; restore the mode of every sub-module afterwards."""
    return in_mode(module, training=False)


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Switch a module to training or eval mode inside the context; restore the mode of every sub-module afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for part, before in modes:
            part.training = before


def check_gradients(module: nn.Module) -> None:
    """Raise RunFailed if a trainable parameter has no gradient; for use after the first backward pass.

    Inference kernels of quantised layers can cut the graph silently; training then runs without changing the weights.
    """
    missing = [name for name, value in module.named_parameters() if value.requires_grad and value.grad is None]
    if missing:
        raise RunFailed(f"{len(missing)} trainable parameters have no gradient in the first step, such as {missing[0]}")
