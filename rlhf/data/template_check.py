"""Check whether a chat template can be used for training."""

from collections.abc import Sequence
from functools import lru_cache

from rlhf.data.control_tokens import Tokenizer
from rlhf.data.encoding import encode_dialogue, generation_prompt_error
from rlhf.data.end_tokens import cut_at_end_of_turn
from rlhf.data.records import Message
from rlhf.data.rendering import ChatTemplateError, DialogueRejected, render


def check_template(tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
    """Check that the chat template can be used for training on dialogues with the roles of this one.

    Each set of roles is tried once, on a synthetic dialogue. A dialogue that the template refuses is not checked here:
    rendering it raises later.

    Raises:
        UserError: For a template that omits the content of a role, does not end every assistant turn with the same
            token, begins an assistant turn otherwise than the generation prompt does, or rewrites earlier turns.
    """
    if not tokenizer.chat_template:
        render(tokenizer, messages)  # raises
    roles = {message.role for message in messages}
    several = sum(message.role == "assistant" for message in messages) > 1
    _check(tokenizer, tokenizer.chat_template, "system" in roles, "tool" in roles, several)


@lru_cache(maxsize=32)
def _check(tokenizer: Tokenizer, chat_template: str, system: bool, tool: bool, several: bool) -> None:
    roles = ["system"] * system + ["user", "assistant"] + ["tool", "assistant"] * tool + ["user", "assistant"] * several
    dialogue = [Message(role, f"zqxj{index}") for index, role in enumerate(roles)]
    try:
        text = render(tokenizer, dialogue)
        for message in dialogue:
            if message.content not in text:
                raise ChatTemplateError(f"does not render the content of {message.role} turns")
        alone = dialogue[: roles.index("assistant") + 1]
        if not render(tokenizer, alone).startswith(render(tokenizer, alone[:-1], generation_prompt=True)):
            raise generation_prompt_error()
        ends = [index for index, role in enumerate(roles) if role == "assistant"]
        for index, place in enumerate(ends):
            start = text.index(dialogue[place].content)
            stop = text.index(dialogue[place + 1].content) if index + 1 < len(ends) else len(text)
            cut_at_end_of_turn(tokenizer, text[start:stop])
        encode_dialogue(tokenizer, dialogue)
    except DialogueRejected:
        return
