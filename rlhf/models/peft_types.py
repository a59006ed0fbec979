"""Type checks for PEFT's classes that do not import PEFT, which takes seconds and is not needed without an adapter."""

import sys
from typing import TYPE_CHECKING

from typing_extensions import TypeIs

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer


def is_peft_model(model: object) -> "TypeIs[PeftModel]":
    """Return whether a model is a `PeftModel`; there is none until PEFT is imported."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def is_tuner_layer(module: object) -> "TypeIs[BaseTunerLayer]":
    """Return whether a module is a layer with an adapter; there is none until PEFT is imported."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)
