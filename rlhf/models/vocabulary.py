"""Checks of tokenizers before anything is loaded: same vocabulary, chat template. No torch here."""

from collections.abc import Mapping
from typing import Any

from rlhf.errors import UserError, key
from rlhf.models.saved_config import find_file
from rlhf.storage.files import read_json

# Fix for a model that cannot be the reference, and for a reward model that cannot be the critic.
OWN_REFERENCE = f"type {key('inputs.reference', None)} (the policy before training)"
OWN_CRITIC = f"type {key('stage.value', None)} {key('stage.value_warmup', 4)} (a critic with the policy's own weights)"


def check_vocabulary(model: Any, path: object, option: str, fix: str) -> None:
    """Raise UserError if a model cannot read the policy's tokens, as far as both are directories that exist already.

    The comparison covers the base vocabularies of the two tokenizers; tokens that a chat template adds are compared
    after loading.

    Args:
        model: The policy's node of ``conf/model``; None skips the check.
        path: Directory of the other model; a path that is not a directory yet is not compared.
        option: Config key whose value is that path.
        fix: Instruction for the user.
    """
    if not isinstance(path, str) or getattr(model, "path", None) is None or model.tokenizer is not None:
        return
    ours, theirs = read_vocabulary(model.path), read_vocabulary(path)
    if ours is not None and theirs is not None and ours != theirs:
        raise other_vocabulary_error(ours, theirs, option, path, fix)


def other_vocabulary_error(
    ours: Mapping[str, int], theirs: Mapping[str, int], option: str, value: Any, fix: str
) -> UserError:
    """Return the error for a model with another vocabulary than the policy.

    Args:
        ours: Token -> id of the policy's tokenizer.
        theirs: Token -> id of the model's tokenizer.
        option: Config key that names the model.
        value: Its value.
        fix: Instruction for the user.
    """
    shared = sum(theirs.get(token) == number for token, number in ours.items())
    return UserError(
        f"has another vocabulary than the policy ({len(theirs)} tokens against {len(ours)}, {shared} the same), so it "
        "cannot read the policy's tokens",
        fix,
        option,
        value,
    )


def lacks_template(path: object) -> bool:
    """Return whether a directory holds a tokenizer without a chat template; False if it holds no tokenizer."""
    if not isinstance(path, str):
        return False
    file = find_file(path, "tokenizer_config.json")
    if file is None:
        return False
    own, _ = read_json(file)
    if not isinstance(own, dict):
        return False
    beside = any(file.with_name(name).exists() for name in ("chat_template.jinja", "chat_template.json"))
    return not (own.get("chat_template") or beside or file.with_name("additional_chat_templates").is_dir())


def read_vocabulary(path: object) -> dict[str, int] | None:
    """Return token -> id of the tokenizer in a model or run directory, without added tokens; None if unreadable."""
    file = find_file(path, "tokenizer.json")
    if file is None:
        return None
    try:
        vocabulary = read_json(file)[0]["model"]["vocab"]
        if isinstance(vocabulary, dict):
            return vocabulary
        return {str(item[0]): index for index, item in enumerate(vocabulary)}
    except (KeyError, TypeError, IndexError):
        return None
