"""Missing-EOS penalty: the treatment of responses without an end-of-sequence token."""

from typing import Any, Literal

from rlhf.errors import UserError, key
from rlhf.functional.scores import MissingEOS
from rlhf.reward.model import find_model_rewards

# Default penalty for a response without EOS, in units of the score: one deviation of a normalised reward model.
MISSING_EOS_PENALTY = 1.0

MissingEOSOption = Literal["auto", "replace", "subtract", "none"]


def resolve_missing_eos(how: MissingEOSOption, penalty: float, reward: Any) -> MissingEOS:
    """Return the treatment of responses without EOS; resolve ``auto`` by the kind of reward.

    A trained reward model was trained on complete responses, so its score of a truncated one means little: ``auto`` is
    "replace" by a fixed penalty (Huang et al. 2024, arXiv 2403.17031). A rule (exact match, a function, gold) checks
    the text; a response that was truncated before its answer is wrong already, so its score is kept: ``auto`` is
    "none".

    Args:
        how: The configured treatment.
        penalty: The configured penalty, in units of the score.
        reward: The reward that scores the responses.

    Raises:
        UserError: For a penalty that would have no effect.
    """
    if how == "auto":
        how = "replace" if find_model_rewards(reward) else "none"
        why = f"{key('stage.missing_eos', 'auto')} leaves the scores of a rule unchanged"
    else:
        why = f"{key('stage.missing_eos', how)} reads no penalty"
    if how == "none" and penalty not in (0.0, MISSING_EOS_PENALTY):
        raise UserError(
            f"is not read, because {why}",
            fix=f"type {key('stage.missing_eos', 'subtract')}",
            option="stage.missing_eos_penalty",
            value=f"{penalty:g}",
        )
    return how
