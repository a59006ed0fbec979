"""Number formats of training."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedConfig

from rlhf.errors import UserError, key


@dataclass(frozen=True)
class Precision:
    """Format of the weights and of the matrix products.

    ``*-mixed`` keeps float32 weights and computes in 16 bits; ``bf16-true`` keeps bfloat16 weights (half the memory;
    updates smaller than about 1/256 of a weight are lost).

    Args:
        trainer: Lightning's name of the precision.
        keep_casts: Under ``*-mixed``: whether 16-bit copies of the weights are kept until the next optimizer step, and
            frozen models are stored in 16 bits. False: every pass casts the weights. The results are the same.
    """

    trainer: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"]
    keep_casts: bool = True

    @property
    def is_mixed(self) -> bool:
        """Return whether weights are float32 and products 16 bits."""
        return self.trainer.endswith("-mixed")

    @property
    def weights(self) -> torch.dtype:
        """Format of the weights."""
        return torch.bfloat16 if self.trainer == "bf16-true" else torch.float32

    @property
    def compute(self) -> torch.dtype:
        """Format of matrix products."""
        return {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}[self.trainer.split("-")[0]]

    def autocast(self, device: torch.device | str) -> AbstractContextManager:
        """Return the autocast context that Lightning uses in a training step, for computation outside of one."""
        if not self.is_mixed:
            return nullcontext()
        return torch.autocast(torch.device(device).type, dtype=self.compute)

    def check(self, accelerator: str) -> None:
        """Raise UserError for float16 on CPU, where ``16-mixed`` would silently run as bfloat16."""
        if accelerator == "cpu" and self.trainer.startswith("16"):
            raise UserError(
                "needs a GPU",
                fix=f"on a CPU, type {key('precision', 'bf16')} or {key('precision', 'fp32')}",
                option="precision",
                value="fp16",
            )


def stored_precision(config: PreTrainedConfig) -> Precision:
    """Return the precision of weights as they are stored: bf16-true for bfloat16, otherwise 32-true."""
    return Precision("bf16-true" if config.dtype is torch.bfloat16 else "32-true")
