"""A reference that is another model than the policy as it starts."""

import torch

from rlhf.errors import UserError
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.language_model import LanguageModel, Reference
from rlhf.models.precision import Precision


def load_reference(path: str, policy: LanguageModel) -> Reference:
    """The model of ``path``, frozen, in the policy's number format.

    It reads the policy's tokens, so raises UserError unless the two have one vocabulary.

    Args:
        path: Run folder, model folder or hub id.
        policy: The model that is trained.
    """
    half = next(policy.parameters()).dtype == torch.bfloat16
    spec = CausalLM(path=path, architecture=None, vocab_size=None)
    model = spec.load(NoAdapter(), Precision("bf16-true" if half else "32-true"))
    own, other = policy.tokenizer.get_vocab(), model.tokenizer.get_vocab()
    if own != other:
        wrong = sum(other.get(token) != index for token, index in own.items())
        raise UserError(
            f"inputs.reference={path}: its vocabulary is not the policy's ({len(other)} tokens against {len(own)}, "
            f"{wrong} of the policy's are missing or have another id), so it cannot read the policy's tokens; "
            "give a reference with the policy's tokenizer, or leave inputs.reference out"
        )
    return Reference(model.disable_dropout().frozen())
