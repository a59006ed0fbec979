"""Dialogue turns in the formats that occur in files: roles, typed content, tool calls, transcripts."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rlhf.data.records import Message

Raw = Mapping[str, Any]

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
_REASONING, _CALL = "<think>\n{}\n</think>", "<tool_call>\n{}\n</tool_call>"
_PARTS = {  # type of a content part -> its text form
    "text": "{}",
    "input_text": "{}",
    "output_text": "{}",
    "reasoning": _REASONING,
    "thinking": _REASONING,
    "tool_call": _CALL,
}
_TURN = re.compile(r"\r?\n[ \t]*\r?\n(Human|Assistant):")
_FIRST_TURN = re.compile(r"\s*(Human|Assistant):")


def is_transcript(text: str) -> bool:
    """Return whether a string is an HH transcript.

    Without the leading empty line it needs two turns to be one.
    """
    return bool(_TURN.match(text) or (_FIRST_TURN.match(text) and _TURN.search(text, 1)))


def parse_transcript(text: str) -> tuple[Message, ...]:
    r"""Parse an HH transcript (`\n\nHuman: ... \n\nAssistant: ...`); consecutive turns of one speaker are joined."""
    if _FIRST_TURN.match(text):
        text = f"\n\n{text.lstrip()}"
    head, *parts = _TURN.split(text)
    if head.strip():
        raise ValueError("a transcript must begin with a turn")
    turns: list[Message] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if turns and turns[-1].role == role:
            turns[-1] = Message(role, f"{turns[-1].content}\n\n{content.strip()}")
        else:
            turns.append(Message(role, content.strip()))
    return tuple(turns)


def _written_call(call: object) -> str:
    """Return a tool call in the usual tags; arguments that are a JSON string (OpenAI's format) become an object."""
    if isinstance(call, Mapping):
        call = call.get("function", call)
    if not isinstance(call, Mapping):
        raise ValueError(f"tool_calls: expected objects, got {type(call).__name__}")
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError):  # a model's arguments are not always valid JSON; others are left unchanged
            call = {**call, "arguments": json.loads(arguments or "{}")}
    return _CALL.replace("{}", json.dumps(call, ensure_ascii=False))


def _written_part(part: object) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ValueError(f"content: expected parts with type and text, got {type(part).__name__}")
    kind = part.get("type", "text")
    if kind not in _PARTS:
        raise ValueError(f"content: a part of type {kind!r} cannot be read as text (types: {', '.join(_PARTS)})")
    value = next((part[key] for key in ("value", "text", kind) if part.get(key) is not None), None)
    if kind == "tool_call" and isinstance(value, Mapping):
        return _written_call(value)
    if not isinstance(value, str):
        raise ValueError(f"content: a part of type {kind!r} has no text")
    return _PARTS[kind].replace("{}", value)


def _content(message: Raw) -> str:
    """Return a message's content as one string; typed parts (text, reasoning, tool calls) in the usual tags."""
    content = message.get("content", message.get("value"))
    calls = list(message.get("tool_calls") or ())
    if message.get("function_call"):  # older form of a single call
        calls.append(message["function_call"])
    if content is None and not calls:
        raise ValueError("content: missing")
    if content is not None and not isinstance(content, str | list | tuple):
        raise ValueError(f"content: expected a string, got {type(content).__name__}")
    thought = message.get("reasoning_content")
    parts = [_REASONING.replace("{}", thought)] if isinstance(thought, str) and thought.strip() else []
    if isinstance(content, str):
        parts += [content] if content or not (calls or parts) else []
    else:
        parts += [_written_part(part) for part in content or ()]
    return "\n".join([*parts, *map(_written_call, calls)])


def parse_message(raw: object) -> Message:
    """Convert {"role" or "from", "content" or "value"} to a message.

    Raises:
        ValueError: For an unknown role, content that cannot be converted, or an assistant turn with a weight other than
            1.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f"expected a message with role and content, got {type(raw).__name__}")
    role = raw.get("role", raw.get("from"))
    known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise ValueError(f"role: {role!r} is not one of {', '.join(_ROLES)}")
    if known == "assistant" and raw.get("weight") not in (None, 1):
        raise ValueError(f"weight: {raw['weight']!r}: turns cannot be excluded from the loss; remove the field")
    return Message(known, _content(raw))


def parse_dialogue(raw: object, field: str, alone: str = "user") -> tuple[Message, ...]:
    """Convert a list of messages, one message, an HH transcript or a plain string to messages.

    Args:
        raw: The value to convert.
        field: Name of its field, for the error.
        alone: Role of a plain string, which becomes one turn.

    Raises:
        ValueError: If the value cannot be converted.
    """
    try:
        if isinstance(raw, str):
            return parse_transcript(raw) if is_transcript(raw) else (Message(alone, raw),)
        if isinstance(raw, Mapping):
            return (parse_message(raw),)
        if isinstance(raw, list | tuple) and raw:
            return tuple(parse_message(turn) for turn in raw)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
    raise ValueError(f"{field}: expected a string or messages, got {'nothing' if not raw else type(raw).__name__}")


def parse_prompt(raw: object, field: str = "prompt") -> tuple[Message, ...]:
    r"""Convert a prompt as ``parse_dialogue``, without a trailing empty `\n\nAssistant:`.

    Transcripts of prompts often end with one.
    """
    turns = parse_dialogue(raw, field)
    open_end = len(turns) > 1 and isinstance(raw, str) and turns[-1].role == "assistant" and not turns[-1].content
    return turns[:-1] if open_end else turns


def with_system(raw: Raw, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Prepend the `system` and `tools` fields, tools in the <tools> form that most chat models know."""
    system = raw.get("system") or ""
    if not isinstance(system, str):
        raise ValueError(f"system: expected a string, got {type(system).__name__}")
    tools = raw.get("tools")
    listed = tools.strip() if isinstance(tools, str) else json.dumps(tools or [], ensure_ascii=False)
    if listed in ("", "[]", "null", "{}"):
        is_repeated = messages[:1] == (Message("system", system),)
        return (Message("system", system), *messages) if system and not is_repeated else messages
    if messages and messages[0].role == "system":
        own, messages = messages[0].content, messages[1:]
        system = own if system in ("", own) else f"{system}\n\n{own}"
    return (Message("system", f"{system}\n\n<tools>\n{listed}\n</tools>".strip()), *messages)


def split_system(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Return the leading system messages, and the rest."""
    count = next((i for i, turn in enumerate(messages) if turn.role != "system"), len(messages))
    return messages[:count], messages[count:]
