"""Usual peak learning rates by size of the model, for AdamW, and the warning about a rate outside of them."""

from dataclasses import dataclass

from rlhf.errors import UserError, key
from rlhf.inspection.roles import Role
from rlhf.planning.recipe import FULL, SCALES
from rlhf.planning.step import Step
from rlhf.planning.step_config import name_in_step

TESTBED = 1e7  # weights up to which `recipe=testbed` is suggested


@dataclass(frozen=True)
class Usual:
    """Range of peak learning rates of AdamW that are in use for models of at most ``weights`` weights.

    Attributes:
        weights: Largest number of weights.
        low: Smallest rate.
        high: Largest rate.
        source: Source of the range.
    """

    weights: float
    low: float
    high: float
    source: str


# The low ends are those of preference optimisation and reinforcement learning; the high ends those of SFT.
PRETRAINING = (
    Usual(TESTBED, 1e-4, 1e-2, "docs/testbed.md; Kaplan et al. 2020, equation D.1: 1.3e-3 at 1M"),
    Usual(6e8, 1e-4, 3e-3, "GPT-3 125M 6e-4, SmolLM2 135M and 360M 3e-3"),
    Usual(3e9, 1e-4, 1e-3, "GPT-3 1.3B 2e-4, TinyLlama 1.1B 4e-4, SmolLM2 1.7B 5e-4"),
    Usual(float("inf"), 5e-5, 4e-4, "GPT-3 6.7B 1.2e-4, Llama 2 7B and Llama 3 8B 3e-4"),
)
FINE_TUNING = (
    Usual(TESTBED, 1e-4, 1e-2, "docs/testbed.md"),
    Usual(6e8, 1e-7, 1e-3, "TRL's DPO and GRPO 1e-6, SFT of SmolLM2 135M 1e-3"),
    Usual(3e9, 1e-7, 3e-4, "TRL's DPO and GRPO 1e-6, SFT of SmolLM2 1.7B 3e-4"),
    Usual(float("inf"), 1e-7, 5e-5, "Zephyr's DPO 5e-7, PPO of Llama 2 1e-6, its SFT 2e-5"),
)
# Schulman et al. 2025: the best rate is ten times that of all weights, for SFT 1.3e-3 at a width of 576 (SmolLM2 135M),
# 4.9e-4 at 2048 (Llama 3.2 1B) and 2.9e-4 at 4096 (Llama 3 8B): 5e-4 (2000 / width)^0.781.
ADAPTER = (
    Usual(TESTBED, 1e-4, 1e-2, "docs/testbed.md"),
    Usual(6e8, 1e-6, 3e-3, "ten times as for all weights: Schulman et al. 2025"),
    Usual(3e9, 1e-6, 1e-3, "ten times as for all weights: Schulman et al. 2025"),
    Usual(float("inf"), 1e-6, 5e-4, "Zephyr's DPO 5e-6, QLoRA's SFT 2e-4; Schulman et al. 2025, Biderman et al. 2024"),
)


def unusual_rate(step: Step, roles: list[Role]) -> UserError | None:
    """Return the warning about a step's peak learning rate; None if it is usual, or nothing is trained.

    Args:
        step: The step.
        roles: Models of its stage.
    """
    weights = max((role.parameters for role in roles if role.trained), default=0)
    optimizer = step.config.get("optimizer") or {}
    rate = optimizer.get("lr")
    if not weights or not isinstance(rate, int | float):
        return None
    if step.config["adapter"]["_target_"] != FULL:
        table, kind = ADAPTER, "an adapter on"
    elif step.config["model"].get("path") is None:
        table, kind = PRETRAINING, "training"
    else:
        table, kind = FINE_TUNING, "fine-tuning all of"
    usual = next(one for one in table if weights <= one.weights)
    scale = SCALES.get(str(optimizer.get("_target_")), 1.0)
    low, high = scale * usual.low, scale * usual.high
    if low <= rate <= high:
        return None
    fix = f"type {key('optimizer.lr', f'{high:.3g}')} or less"
    if rate < low:
        fix = f"type {key('optimizer.lr', f'{low:.3g}')} or more"
        fix += ", or recipe=testbed" if weights <= TESTBED else ""
    error = UserError(
        f"is {'above' if rate > high else 'below'} the usual {low:.3g} to {high:.3g} for {kind} "
        f"{_rounded(weights)} weights ({usual.source})",
        fix=fix,
        option="optimizer.lr",
        value=rate,
    )
    return name_in_step(error, step.own, step.name)


def _rounded(weights: float) -> str:
    return f"{weights / 1e9:.1f}B" if weights >= 1e9 else f"{weights / 1e6:.0f}M"
