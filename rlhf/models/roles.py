"""Models beside the policy that read its tokens: a reference and a critic must share its vocabulary."""

import copy

from transformers import PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.model_config import no_head
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.language_model import LanguageModel, Reference
from rlhf.models.precision import Precision
from rlhf.models.scalar import ScalarModel
from rlhf.models.shared_base import share
from rlhf.vocabulary import OWN_CRITIC


def require_same_vocabulary(
    policy: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, what: str, instead: str
) -> None:
    """Raises UserError unless both tokenizers give every id the same token.

    Args:
        policy: Tokenizer of the policy.
        other: Tokenizer of the model that is to read the policy's ids.
        what: The key and value that name that model.
        instead: What to type.
    """
    ours, theirs = policy.get_vocab(), other.get_vocab()
    if ours != theirs:
        shared = sum(theirs.get(token) == number for token, number in ours.items())
        raise UserError(
            f"{what} has another vocabulary than the policy ({len(theirs)} tokens against {len(ours)}, {shared} the "
            f"same), so it cannot read the policy's tokens: type {instead}"
        )


def reference_of(policy: LanguageModel, path: str | None) -> Reference:
    """The model that KL is measured against: the one at ``path``, or the policy as it is now.

    Raises:
        UserError: For a model with another vocabulary, or a shorter context.
    """
    if path is None:
        return policy.reference()
    what = f"inputs.reference={path}"
    if policy.shared is not None:
        model = policy.shared.language_model(path)
        require_same_vocabulary(
            policy.tokenizer, model.tokenizer, what, "inputs.reference=null (the policy as it starts)"
        )
        return Reference(model, shared=True)
    weights = next(policy.base.parameters()).dtype
    precision = Precision("bf16-true") if str(weights) == "torch.bfloat16" else Precision("32-true")
    try:
        model = CausalLM(path=str(path), architecture=None, vocab_size=None).load(NoAdapter(), precision)
    except UserError as error:
        raise UserError(str(error).replace(f"model.path={path}", what)) from error
    require_same_vocabulary(policy.tokenizer, model.tokenizer, what, "inputs.reference=null (the policy as it starts)")
    if model.context_length < policy.context_length:
        raise UserError(
            f"{what} reads {model.context_length} tokens, the policy {policy.context_length}: "
            "type inputs.reference=null (the policy as it starts)"
        )
    return Reference(model.disable_dropout().frozen())


def copy_of_start(policy: LanguageModel) -> Reference | None:
    """What has to be held from now on for ``start_of`` to give the policy as it is now; None where nothing has to.

    With an adapter the base under it is the start, and weights on disk can be read again; weights that were drawn, all
    of them or those of tokens that were added, must be copied.
    """
    if policy.adapted:
        return None
    spec = policy.spec
    if spec is None or spec.path is None or spec.config().get_text_config().vocab_size != policy.config.vocab_size:
        return policy.reference()
    return None


def start_of(policy: LanguageModel, copy: Reference | None) -> Reference:
    """The policy as it was before training: read again, so that it need not be held while the policy trains.

    Args:
        policy: Trained by now, or not yet.
        copy: What ``copy_of_start`` gave before.
    """
    if copy is not None:
        return copy
    if policy.adapted:
        return policy.reference()
    assert policy.spec is not None  # copy_of_start
    return Reference(policy.spec.load(NoAdapter(), policy.precision).disable_dropout().frozen())


def critic_of(policy: LanguageModel, path: str | None) -> ScalarModel:
    """The critic: of the reward model at ``path``, or of the policy's own weights with a head of zeros.

    Either way with an adapter of its own, if the policy has one; the head is trained whole. On a shared base that
    adapter sits on the policy's weights, and else on weights of its own.

    Raises:
        UserError: For a language model, whose head would be drawn, and for a model with another vocabulary.
    """
    if path is None:
        return ScalarModel(copy.deepcopy(policy) if policy.shared is None else share(policy), zero_init=True)
    if not CausalLM(path, None, None).scalar:
        raise no_head("stage.value", path, OWN_CRITIC)
    if policy.shared is not None:
        critic = policy.shared.scalar(path, fresh=True)
    else:
        critic = ScalarModel.load(path, policy.adapter, policy.precision)
    critic.safety_head = None  # nothing of a critic's loss reads it
    require_same_vocabulary(policy.tokenizer, critic.tokenizer, f"stage.value={path}", OWN_CRITIC)
    return critic
