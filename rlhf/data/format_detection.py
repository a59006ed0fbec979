"""Detection of the format of a row, and lookup of formats by name."""

from rlhf import importing
from rlhf.data.formats import FORMATS, Adapter
from rlhf.data.turns import Raw, is_transcript
from rlhf.errors import UserError, suggest

# Fields that tell a row's shape, where one of them is not null.
_SHAPES = (("messages",), ("conversations",), ("chosen", "rejected"), ("responses",), ("instruction",), ("question",))


def detect(raw: Raw) -> str:
    """Return the format that a row's keys identify.

    Raises:
        ValueError: If no format fits.
    """
    # Rows of several formats in one Arrow table have the columns of all of them, null where a row lacks one.
    other = [field for fields in _SHAPES for field in fields if all(raw.get(field) is None for field in fields)]
    keys = set(raw) - set(other) or set(raw)
    if {"prompt", "chosen", "rejected"} <= keys:  # UltraFeedback has "messages" too, which repeat the chosen ones
        return "preference"
    if "conversations" in keys:
        return "sharegpt"
    if "messages" in keys:
        return "messages"
    if {"chosen", "rejected"} <= keys:
        whole = isinstance(raw["chosen"], str) and is_transcript(raw["chosen"])
        return "hh" if whole else "preference"
    if {"prompt", "responses"} <= keys:
        return "ranking"
    if "prompt" in keys and keys & {"response", "completion"} and keys & {"desirable", "label", "kto_tag"}:
        return "unpaired"
    if "prompt" in keys and keys & {"completion", "response", "output"}:
        return "prompt_completion"
    if "instruction" in keys:
        return "alpaca"
    if {"question", "answer"} <= keys:
        return "question_answer"
    if "prompt" in keys:
        return "prompt"
    if keys & {"text", "content"}:
        return "text"
    raise ValueError(f"no format has the fields {', '.join(sorted(keys)) or '(none)'}")


def find_adapter(name: str) -> Adapter | None:
    """Return the adapter of a format's name or of `package.module:function`; None for auto.

    Raises:
        UserError: If there is no such format or function.
    """
    if name == "auto":
        return None
    if name in FORMATS:
        return FORMATS[name]
    if ":" not in name:
        raise UserError(
            f"no such format{suggest(name, [*FORMATS, 'auto'])}",
            fix="type the name of a format, or module:function",
            option="data.format",
            value=name,
        )
    return importing.load_function("data.format", name)
