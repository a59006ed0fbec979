"""Turns of a dialogue in the many ways files write them: roles, typed content, tool calls, transcripts."""

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
_PARTS = {  # type of a part of the content -> how it is written
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
    """Whether a string is an HH transcript; one without its leading empty line counts if it has two turns."""
    return bool(_TURN.match(text) or (_FIRST_TURN.match(text) and _TURN.search(text, 1)))


def parse_transcript(text: str) -> tuple[Message, ...]:
    """Turns of an HH transcript (`\\n\\nHuman: ... \\n\\nAssistant: ...`); turns of one speaker in a row are joined."""
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
    """A tool call in the usual tags, arguments that are JSON in a string (OpenAI's way) as the object they are."""
    if isinstance(call, Mapping):
        call = call.get("function", call)
    if not isinstance(call, Mapping):
        raise ValueError(f"tool_calls: expected objects, got {type(call).__name__}")
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError):  # what a model wrote is not always JSON, and then stays as it is
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
        raise ValueError(f"content: a part of type {kind!r} holds no text")
    return _PARTS[kind].replace("{}", value)


def _content(message: Raw) -> str:
    """What a message says as one string; typed parts (text, reasoning, tool calls) in the usual tags."""
    content = message.get("content", message.get("value"))
    calls = list(message.get("tool_calls") or ())
    if message.get("function_call"):  # before there were several
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


def message(raw: object) -> Message:
    """One turn from {"role" or "from", "content" or "value"}."""
    if not isinstance(raw, Mapping):
        raise ValueError(f"expected a message with role and content, got {type(raw).__name__}")
    role = raw.get("role", raw.get("from"))
    known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise ValueError(f"role: {role!r} is not one of {', '.join(_ROLES)}")
    if known == "assistant" and raw.get("weight") not in (None, 1):
        raise ValueError(f"weight: {raw['weight']!r}: turns cannot be left out of the loss; take the field away")
    return Message(known, _content(raw))


def dialogue(raw: object, field: str, alone: str = "user") -> tuple[Message, ...]:
    """Messages from a list of them, one of them, an HH transcript, or a plain string (one turn of role `alone`)."""
    try:
        if isinstance(raw, str):
            return parse_transcript(raw) if is_transcript(raw) else (Message(alone, raw),)
        if isinstance(raw, Mapping):
            return (message(raw),)
        if isinstance(raw, list | tuple) and raw:
            return tuple(message(turn) for turn in raw)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
    raise ValueError(f"{field}: expected a string or messages, got {'nothing' if not raw else type(raw).__name__}")


def asked(raw: object, field: str = "prompt") -> tuple[Message, ...]:
    """A prompt: as ``dialogue``, without the empty `\\n\\nAssistant:` that transcripts of prompts often end with."""
    turns = dialogue(raw, field)
    open_end = len(turns) > 1 and isinstance(raw, str) and turns[-1].role == "assistant" and not turns[-1].content
    return turns[:-1] if open_end else turns


def with_system(raw: Raw, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """`system` and `tools` fields put in front, tools in the <tools> form most chat models know."""
    system = raw.get("system") or ""
    if not isinstance(system, str):
        raise ValueError(f"system: expected a string, got {type(system).__name__}")
    tools = raw.get("tools")
    listed = tools.strip() if isinstance(tools, str) else json.dumps(tools or [], ensure_ascii=False)
    if listed in ("", "[]", "null", "{}"):
        own_says_it = messages[:1] == (Message("system", system),)
        return (Message("system", system), *messages) if system and not own_says_it else messages
    if messages and messages[0].role == "system":
        own, messages = messages[0].content, messages[1:]
        system = own if system in ("", own) else f"{system}\n\n{own}"
    return (Message("system", f"{system}\n\n<tools>\n{listed}\n</tools>".strip()), *messages)


def split_system(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """(the leading system messages, the rest)."""
    count = next((i for i, turn in enumerate(messages) if turn.role != "system"), len(messages))
    return messages[:count], messages[count:]
