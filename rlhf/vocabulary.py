"""What tokenizers are told apart by before anything is loaded: one vocabulary, a chat template. No torch here."""

from typing import Any

from rlhf.errors import UserError
from rlhf.files import read_json
from rlhf.model_config import file_of

OWN_CRITIC = "stage.value=null stage.value_warmup=4 (a critic of the policy's own weights)"
"""What to type where a reward model cannot be the critic."""


def check_vocabulary(model: Any, path: object, what: str, instead: str) -> None:
    """Refuses a model that cannot read the policy's tokens, where both are folders that can be looked into by now.

    Compared are the words of the two tokenizers; tokens that a chat template adds are left to the loaded models.

    Args:
        model: What ``conf/model`` says of the policy; None says nothing.
        path: Folder of the other model; what is no folder yet is not compared.
        what: The key that names it.
        instead: What to type.
    """
    if not isinstance(path, str) or getattr(model, "path", None) is None or model.tokenizer is not None:
        return
    ours, theirs = words(model.path), words(path)
    if ours is not None and theirs is not None and ours != theirs:
        shared = sum(theirs.get(word) == number for word, number in ours.items())
        raise UserError(
            f"{what}={path} has another vocabulary than the policy ({len(theirs)} tokens against {len(ours)}, {shared} "
            f"the same), so it cannot read the policy's tokens: type {instead}"
        )


def lacks_template(path: object) -> bool:
    """Whether a folder holds a tokenizer without a chat template; of what is no such folder nothing is said."""
    if not isinstance(path, str):
        return False
    file = file_of(path, "tokenizer_config.json")
    if file is None:
        return False
    own, _ = read_json(file)
    if not isinstance(own, dict):
        return False
    beside = any(file.with_name(name).exists() for name in ("chat_template.jinja", "chat_template.json"))
    return not (own.get("chat_template") or beside or file.with_name("additional_chat_templates").is_dir())


def words(path: object) -> dict[str, int] | None:
    """Word -> id of the tokenizer of a model or run folder, without added tokens; None where there is none to read."""
    file = file_of(path, "tokenizer.json")
    if file is None:
        return None
    try:
        vocabulary = read_json(file)[0]["model"]["vocab"]
        if isinstance(vocabulary, dict):
            return vocabulary
        return {str(item[0]): index for index, item in enumerate(vocabulary)}
    except (KeyError, TypeError, IndexError):
        return None
