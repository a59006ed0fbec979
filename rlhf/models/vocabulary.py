"""Checks of tokenizers before anything is loaded: same vocabulary, chat template. No torch here."""

from typing import Any

from rlhf.errors import UserError
from rlhf.models.saved_config import find_file
from rlhf.storage.files import read_json

# Fix for a reward model that cannot be the critic.
OWN_CRITIC = "stage.value=null stage.value_warmup=4 (a critic of the policy's own weights)"


def check_vocabulary(model: Any, path: object, what: str, instead: str) -> None:
    """Raise UserError if a model cannot read the policy's tokens, as far as both are directories that exist already.

    The comparison covers the base vocabularies of the two tokenizers; tokens that a chat template adds are compared
    after loading.

    Args:
        model: The policy's node of ``conf/model``; None skips the check.
        path: Directory of the other model; a path that is not a directory yet is not compared.
        what: Config key that names it.
        instead: Text for the user to type instead.
    """
    if not isinstance(path, str) or getattr(model, "path", None) is None or model.tokenizer is not None:
        return
    ours, theirs = read_vocabulary(model.path), read_vocabulary(path)
    if ours is not None and theirs is not None and ours != theirs:
        shared = sum(theirs.get(word) == number for word, number in ours.items())
        raise UserError(
            f"{what}={path} has another vocabulary than the policy ({len(theirs)} tokens against {len(ours)}, {shared} "
            f"the same), so it cannot read the policy's tokens: type {instead}"
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
