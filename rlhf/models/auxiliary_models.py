"""Auxiliary models that read the policy's tokens: the reference and the critic, which must share its vocabulary."""

import copy
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.errors import UserError, renaming
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.language_model import LanguageModel
from rlhf.models.precision import Precision
from rlhf.models.reference import Reference, start_reference
from rlhf.models.saved_config import missing_head_error
from rlhf.models.scalar import ScalarModel
from rlhf.models.shared_base import copy_tree
from rlhf.models.vocabulary import OWN_CRITIC, OWN_REFERENCE, other_vocabulary_error


def require_same_vocabulary(
    policy: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, option: str, value: Any, fix: str
) -> None:
    """Raise UserError unless both tokenizers map every token to the same id.

    Args:
        policy: Tokenizer of the policy.
        other: Tokenizer of the model that reads the policy's ids.
        option: Config key that names that model.
        value: Its value.
        fix: Instruction for the user.
    """
    ours, theirs = policy.get_vocab(), other.get_vocab()
    if ours != theirs:
        raise other_vocabulary_error(ours, theirs, option, value, fix)


def load_reference(policy: LanguageModel, path: str | None) -> Reference:
    """Return the model that KL is measured against: the model at ``path``, or the policy as it is now.

    Raises:
        UserError: If the model has another vocabulary or a shorter context than the policy.
    """
    if path is None:
        return start_reference(policy)
    option = "inputs.reference"
    if policy.shared is not None:
        model = policy.shared.language_model(path)
        require_same_vocabulary(policy.tokenizer, model.tokenizer, option, path, OWN_REFERENCE)
        return Reference(model, shared=True)
    weights = next(policy.base.parameters()).dtype
    precision = Precision("bf16-true") if str(weights) == "torch.bfloat16" else Precision("32-true")
    with renaming("model.path", option):
        model = CausalLM(path=str(path), architecture=None, vocab_size=None).load(NoAdapter(), precision)
    require_same_vocabulary(policy.tokenizer, model.tokenizer, option, path, OWN_REFERENCE)
    if model.context_length < policy.context_length:
        raise UserError(
            f"has a context of {model.context_length} tokens, and the policy has one of {policy.context_length}",
            OWN_REFERENCE,
            option,
            path,
        )
    return Reference(model.disable_dropout().frozen())


def copy_start_if_needed(policy: LanguageModel) -> Reference | None:
    """Return a copy of the policy if ``restore_start`` needs one to reconstruct its present state, else None.

    With an adapter, the base under it is the start, and weights on disk can be read again. Random weights, whether all
    of them or only those of added tokens, must be copied.
    """
    if policy.adapted:
        return None
    spec = policy.spec
    if spec is None or spec.path is None or spec.config().get_text_config().vocab_size != policy.config.vocab_size:
        return start_reference(policy)
    return None


def restore_start(policy: LanguageModel, copy: Reference | None) -> Reference:
    """Return the policy as it was before training, reloaded so that it need not be held while the policy trains.

    Args:
        policy: The policy, trained or not.
        copy: Return value of ``copy_start_if_needed`` before training.
    """
    if copy is not None:
        return copy
    if policy.adapted:
        return start_reference(policy)
    assert policy.spec is not None  # copy_start_if_needed
    return Reference(policy.spec.load(NoAdapter(), policy.precision).disable_dropout().frozen())


def load_critic(policy: LanguageModel, path: str | None) -> ScalarModel:
    """Build the critic from the reward model at ``path``, or from the policy's own weights with a zero head.

    Either has its own adapter if the policy has an adapter; the head is trained in full. On a shared base that adapter
    is on the policy's weights, otherwise on separate weights.

    Raises:
        UserError: If ``path`` is a language model, whose head would be random, or has another vocabulary.
    """
    if path is None:
        return ScalarModel(copy.deepcopy(policy) if policy.shared is None else copy_tree(policy), zero_init=True)
    with renaming("model.path", "stage.value"):
        if not CausalLM(path, None, None).scalar:
            raise missing_head_error("stage.value", path, OWN_CRITIC)
        if policy.shared is not None:
            critic = policy.shared.scalar(path, fresh=True)
        else:
            critic = ScalarModel.load(path, policy.adapter, policy.precision)
    critic.safety_head = None  # a critic's loss does not use it
    require_same_vocabulary(policy.tokenizer, critic.tokenizer, "stage.value", path, OWN_CRITIC)
    return critic
