"""End tokens: of an assistant turn, as its chat template writes it, and of a plain-text document."""

from functools import lru_cache

from rlhf.data.control_tokens import Tokenizer, special_ids
from rlhf.data.records import Message
from rlhf.data.rendering import ChatTemplateError, render, tokenize
from rlhf.errors import UserError, key

END_OF_TEXT = "<|endoftext|>"


@lru_cache(maxsize=8)
def find_end_of_turn(tokenizer: Tokenizer, chat_template: str) -> tuple[str, int, str]:
    """Return the end-of-turn token, its id, and the template's text between the content and it."""
    mark = "zqxj"
    text = render(tokenizer, [Message("user", "a"), Message("assistant", mark)])
    if mark not in text:
        raise ChatTemplateError("does not render the content of an assistant turn")
    tail = text[text.rindex(mark) + len(mark) :]
    special = special_ids(tokenizer)
    for index in tokenize(tokenizer, tail):
        if index in special:
            token = str(tokenizer.convert_ids_to_tokens(index))
            return token, index, tail.partition(token)[0]
    raise ChatTemplateError("ends an assistant turn without a special token, so no policy can be trained to stop")


def cut_at_end_of_turn(tokenizer: Tokenizer, turn: str, ended: bool = True) -> str:
    """Truncate a rendered assistant turn after its end-of-turn token; a turn that has not `ended`, after its content.

    The template's text between content and end-of-turn (Llama 2: a space) belongs to the end.
    """
    end, _, closing = find_end_of_turn(tokenizer, tokenizer.chat_template)
    if end not in turn:
        raise ChatTemplateError(
            f"does not end every assistant turn with {end}, so a policy would not be trained to stop"
        )
    return turn[: turn.rindex(end) + len(end)] if ended else turn[: turn.rindex(end)].removesuffix(closing)


def end_of_turn_id(tokenizer: Tokenizer) -> int:
    """Return the id of the special token that the chat template writes after an assistant turn."""
    render(tokenizer, [Message("user", "a")])  # a missing template is reported before the cache key needs it
    return find_end_of_turn(tokenizer, tokenizer.chat_template)[1]


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Return the id of the token that ends a plain-text document: <|endoftext|> if present, else eos.

    Raises:
        UserError: If the tokenizer has neither.
    """
    index = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    if isinstance(index, int) and index != tokenizer.unk_token_id:
        return index
    if isinstance(index, int) and tokenizer.convert_ids_to_tokens(index) == END_OF_TEXT:
        return index  # SmolLM2 declares its <|endoftext|> as the unknown token
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has neither <|endoftext|> nor an EOS token",
            fix=f"type another tokenizer: {key('model.tokenizer', 'DIRECTORY_OR_HUB_ID')}",
        )
    return int(tokenizer.eos_token_id)
