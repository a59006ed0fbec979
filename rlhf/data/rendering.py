"""Rendering of dialogues by chat templates, and tokenization of the rendered text."""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jinja2

from rlhf.data.control_tokens import ControlTokens, Tokenizer
from rlhf.data.records import Message
from rlhf.data.time_limit import memory_limit, time_limit
from rlhf.errors import UserError, first_line, key

RENDER_SECONDS = 5.0  # CPU time limit of one dialogue, which usually takes milliseconds
RENDER_BYTES = 2**30  # memory limit of one dialogue, which usually takes kilobytes
RENDER_CHARACTERS = 1_000_000  # limit of one dialogue, in addition to a multiple of its content


class ChatTemplateError(UserError):
    """Error for a chat template at fault; the fix is another template unless a better one is given."""

    def __init__(
        self,
        problem: str,
        fix: str = "",
        option: str = "model.chat_template",
        value: Any = ...,
        where: str = "",
    ) -> None:
        super().__init__(problem, fix or f"type {key('model.chat_template', 'chatml')}", option, value, where)


class TemplateUnbounded(ChatTemplateError):
    """Error for a chat template that takes more time, memory or text than any dialogue needs."""


class DialogueRejected(ChatTemplateError):
    """Error for a dialogue that the chat template cannot render, for example consecutive user turns."""


_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # a tag that only transformers defines


def check_syntax(chat_template: str) -> None:
    """Raise UserError for a text that is not a Jinja template."""
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", chat_template))
    except jinja2.TemplateSyntaxError as error:
        raise _syntax_error(error) from None


def _syntax_error(error: jinja2.TemplateSyntaxError) -> ChatTemplateError:
    return ChatTemplateError(
        f"is not a Jinja template (line {error.lineno}: {error})",
        fix=f"fix the file, or type {key('model.chat_template', 'chatml')}",
    )


def render(tokenizer: Tokenizer, messages: Sequence[Message], generation_prompt: bool = False) -> str:
    """Return the dialogue as the template renders it, its special tokens included as text.

    Control tokens spelled in the messages have a mark inside (``ControlTokens.guard``), so that ``tokenize`` encodes
    them as text.

    Raises:
        UserError: If there is no chat template, or if it is invalid, unbounded or cannot render the dialogue.
    """
    controls = control_tokens(tokenizer)
    turns = [Message(message.role, controls.guard(message.content)) for message in messages]
    return _render_plain(tokenizer, turns, generation_prompt)


_RAISED = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def _render_plain(tokenizer: Tokenizer, messages: Sequence[Message], generation_prompt: bool = False) -> str:
    if not tokenizer.chat_template:
        raise ChatTemplateError("the tokenizer has no chat template, and chat data needs one")
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        with time_limit(RENDER_SECONDS, TemplateUnbounded(f"takes longer than {RENDER_SECONDS:g} s for one dialogue")):
            # A list, because transformers refuses a single dialogue without turns, which templates can often render.
            found = tokenizer.apply_chat_template([turns], tokenize=False, add_generation_prompt=generation_prompt)
        text = str(found[0])
        # A template may write the content several times, for example as plain text and as JSON.
        if len(text) > RENDER_CHARACTERS + 100 * sum(len(message.content) for message in messages):
            raise TemplateUnbounded(f"renders one dialogue as {len(text)} characters, more than allowed")
        return text
    except MemoryError:
        raise TemplateUnbounded("exceeds the memory limit of one dialogue") from None
    except jinja2.TemplateSyntaxError as error:
        raise _syntax_error(error) from None
    except _RAISED as error:
        roles = ", ".join(message.role for message in messages) or "(none)"
        reason = first_line(error)
        raise DialogueRejected(f"cannot render a dialogue of the turns {roles} ({reason})") from None


def control_tokens(tokenizer: Tokenizer) -> ControlTokens:
    """Return the control tokens of a tokenizer: special ones, and added ones that its chat template writes."""
    # The cache key includes tokens that are added, and roles such as padding that are set, after construction.
    return _control_tokens(tokenizer, tokenizer.chat_template, len(tokenizer), tuple(tokenizer.all_special_tokens))


@lru_cache(maxsize=8)
def _control_tokens(
    tokenizer: Tokenizer, chat_template: str | None, size: int, special: tuple[str, ...]
) -> ControlTokens:
    written = ""
    if chat_template:
        turns = [Message("user", "a"), Message("assistant", "a"), Message("user", "a")]
        for dialogue in (turns[:1], turns, [Message("system", "a"), *turns]):
            # The first use of a template: memory is limited only here, because a limit for every row would cost time.
            try:
                with memory_limit(RENDER_BYTES):
                    written += _render_plain(tokenizer, dialogue, generation_prompt=True)
            except TemplateUnbounded:
                raise
            except UserError:  # reported where the template is used
                pass
    return ControlTokens(tokenizer, written)


def tokenize(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a piece of rendered text; nothing is added before or after it."""
    return control_tokens(tokenizer).tokenize(text)


def tokenize_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of text from the data, in which spelled control tokens are encoded as text."""
    controls = control_tokens(tokenizer)
    return controls.tokenize(controls.guard(text))
