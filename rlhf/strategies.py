"""Lightning's strategies that a stage can be trained under. No torch here."""

import re

#: Strategies that hold whole weights in every process, by name or by class.
WHOLE = re.compile(r"auto|single_device|ddp(_\w+)?|(.*\.)?(DDP|SingleDevice)Strategy")


def sharded(strategy: str) -> str:
    """Return what is wrong with a strategy that cuts weights, gradients or optimizer states up over processes."""
    return (
        f"trainer.strategy={strategy}: weights that are cut up over processes cannot be trained yet (the norm of the "
        "gradient would be each process's own); type trainer=ddp"
    )
