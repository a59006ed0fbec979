"""Function reward: a Python function as a reward."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf import importing
from rlhf.data.records import Prompt
from rlhf.errors import UserError, first_line, key
from rlhf.reward.base import Reward
from rlhf.sampler.rollout import Rollout


class FunctionReward(Reward):
    """Rule-based reward: any Python function ``(prompt: Prompt, response: str, **arguments) -> float``.

    Args:
        function: Import path of the function, as ``package.module:name``.
        arguments: Additional keyword arguments of the function.
    """

    def __init__(self, function: str, arguments: dict[str, Any] | None = None) -> None:
        self.name, self.arguments = function, dict(arguments or {})
        self.function = self.check_hyperparameters(function, arguments)

    @staticmethod
    def check_hyperparameters(function: str, arguments: dict[str, Any] | None = None) -> Callable[..., Any]:
        """Import and return the function.

        Raises:
            UserError: For a function that cannot be imported or has another signature.
        """
        found = importing.load_function("reward.function", function)
        try:
            inspect.signature(found).bind(None, "", **(arguments or {}))
        except (TypeError, ValueError) as error:
            call = ", ".join(["prompt", "response", *(f"{name}={value}" for name, value in (arguments or {}).items())])
            raise UserError(
                f"cannot be called as function({call}): {first_line(error)}",
                fix=f"change its parameters or {key('reward.arguments')}",
                option="reward.function",
                value=function,
            ) from error
        return found

    def __call__(self, rollout: Rollout) -> Tensor:
        """Return the function's values, [B]."""
        pairs = zip(rollout.prompts, rollout.texts, strict=True)
        return torch.tensor([self._value(prompt, text) for prompt, text in pairs], device=rollout.mask.device)

    def _value(self, prompt: Prompt, text: str) -> float:
        try:
            value = self.function(prompt, text, **self.arguments)
        except Exception as error:  # a user's function may raise anything; the message names the function
            raise UserError(
                f"failed on the response {text[:60]!r} with {type(error).__name__}: {first_line(error)}",
                fix="correct the function",
                option="reward.function",
                value=self.name,
            ) from error
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(
                f"returned {value!r} for the response {text[:60]!r}, must return a finite number",
                fix="correct the function",
                option="reward.function",
                value=self.name,
            )
        return number
