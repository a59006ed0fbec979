"""From the shapes in which data comes to the record types. A format is a function raw dict -> record."""

import importlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rlhf.data.records import (
    GRADES,
    TIE,
    Comparison,
    Demonstration,
    Label,
    Message,
    Prompt,
    Record,
    Text,
)
from rlhf.errors import UserError, suggest

Raw = Mapping[str, Any]
Adapter = Callable[[Raw], Record]

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_GRADE_WORDS = {
    **{grade: grade for grade in GRADES},
    TIE: TIE,
    "significantly better": "significantly",
    "slightly better": "slightly",
    "negligibly": "negligible",
    "negligibly better": "negligible",
    "negligibly better / unsure": "negligible",
    "unsure": "negligible",
}


def _string(raw: Raw, *keys: str) -> str:
    """The first of the fields that is there, which must be a string."""
    for key in keys:
        if raw.get(key) is not None:
            if not isinstance(raw[key], str):
                raise ValueError(f"{key}: expected a string, got {type(raw[key]).__name__}")
            return str(raw[key])
    raise ValueError(f"{keys[0]}: missing")


def _content(message: Raw) -> str:
    """What a message says as one string; typed parts (text, reasoning, tool calls) in the usual tags."""
    content = message.get("content", message.get("value"))
    if content is None and not message.get("tool_calls"):
        raise ValueError("content: missing")
    parts = [content] if isinstance(content, str) and (content or not message.get("tool_calls")) else []
    for part in content if isinstance(content, list | tuple) else ():
        kind, value = part.get("type", "text"), part.get("value", part.get("text"))
        if not isinstance(value, str):
            raise ValueError(f"content: a part of type {kind!r} holds no text (images and audio are not supported)")
        wrap = {"reasoning": "<think>\n{}\n</think>", "tool_call": "<tool_call>\n{}\n</tool_call>"}.get(kind, "{}")
        parts.append(wrap.replace("{}", value))
    for call in message.get("tool_calls") or ():
        parts.append(f"<tool_call>\n{json.dumps(call.get('function', call), ensure_ascii=False)}\n</tool_call>")
    if content is not None and not isinstance(content, str | list | tuple):
        raise ValueError(f"content: expected a string, got {type(content).__name__}")
    return "\n".join(parts)


def _message(raw: object) -> Message:
    if not isinstance(raw, Mapping):
        raise ValueError(f"expected a message with role and content, got {type(raw).__name__}")
    role = raw.get("role", raw.get("from"))
    if role not in _ROLES:
        raise ValueError(f"role: {role!r} is not one of {', '.join(_ROLES)}")
    return Message(_ROLES[role], _content(raw))


def _dialogue(raw: object, field: str, alone: str = "user") -> tuple[Message, ...]:
    """Messages from a list of them, one of them, an HH transcript, or a plain string (one turn of role `alone`)."""
    try:
        if isinstance(raw, str):
            return parse_transcript(raw) if _TURN.match(raw) else (Message(alone, raw),)
        if isinstance(raw, Mapping):
            return (_message(raw),)
        if isinstance(raw, list | tuple) and raw:
            return tuple(_message(message) for message in raw)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
    raise ValueError(f"{field}: expected a string or messages, got {'nothing' if not raw else type(raw).__name__}")


def parse_transcript(text: str) -> tuple[Message, ...]:
    """Turns of an HH transcript (`\\n\\nHuman: ... \\n\\nAssistant: ...`); turns of one speaker in a row are joined."""
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


def _with_system(raw: Raw, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """`system` and `tools` fields put in front, tools in the <tools> form most chat models know."""
    system = raw.get("system") or ""
    tools = raw.get("tools")
    if tools:
        if messages and messages[0].role == "system":
            system, messages = messages[0].content, messages[1:]
        listed = tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)
        system = f"{system}\n\n<tools>\n{listed}\n</tools>".strip()
    return (Message("system", system), *messages) if system else messages


def _grade(raw: Raw) -> str | None:
    grade = raw.get("grade")
    if grade is None:
        return None
    known = _GRADE_WORDS.get(str(grade).strip().lower())
    if known is None:
        raise ValueError(f"grade: {grade!r} is not one of {', '.join((*GRADES, TIE))}")
    return known


def _pair_scores(raw: Raw) -> tuple[float, ...] | None:
    for better, worse in (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score")):
        if raw.get(better) is not None and raw.get(worse) is not None:
            return (float(raw[better]), float(raw[worse]))
    return None if raw.get("scores") is None else tuple(float(score) for score in raw["scores"])


def text(raw: Raw) -> Text:
    """{"text"}."""
    found = _string(raw, "text", "content")
    if not found.strip():
        raise ValueError("text: empty")
    return Text(found)


def alpaca(raw: Raw) -> Demonstration:
    """{"instruction", "input", "output"}, optionally "system" and "history" (pairs)."""
    question = _string(raw, "instruction")
    if raw.get("input"):
        question = f"{question}\n{_string(raw, 'input')}"
    turns = [
        Message(role, content)
        for pair in raw.get("history") or ()
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
    answer = Message("assistant", _string(raw, "output"))
    return Demonstration(_with_system(raw, (*turns, Message("user", question), answer)))


def sharegpt(raw: Raw) -> Demonstration | Comparison | Label:
    """{"conversations": [{"from", "value"}]}, with "chosen"/"rejected" a comparison, with "label" an unpaired one."""
    return _chat(raw, "conversations")


def messages(raw: Raw) -> Demonstration | Comparison | Label:
    """{"messages": [{"role", "content"}]}, optionally "tools"; further as sharegpt."""
    return _chat(raw, "messages")


def _chat(raw: Raw, field: str) -> Demonstration | Comparison | Label:
    dialogue = _with_system(raw, _dialogue(raw.get(field), field))
    if "chosen" in raw and "rejected" in raw:
        return _comparison(raw, dialogue)
    if isinstance(raw.get("label", raw.get("kto_tag")), bool):
        if dialogue[-1].role != "assistant":
            raise ValueError(f"{field}: a labelled dialogue must end with the assistant")
        return Label(dialogue[:-1], dialogue[-1].content, raw.get("label", raw.get("kto_tag")))
    return Demonstration(dialogue)


def prompt_completion(raw: Raw) -> Demonstration:
    """{"prompt", "completion"}, each a string or messages ("response" and "output" are other names)."""
    field = next((key for key in ("completion", "response", "output") if key in raw), "completion")
    answer = _dialogue(raw.get(field), field, alone="assistant")
    return Demonstration(_with_system(raw, (*_dialogue(raw.get("prompt"), "prompt"), *answer)))


def preference(raw: Raw) -> Comparison:
    """{"prompt", "chosen", "rejected"} as strings, message lists, or whole dialogues; "grade", "scores" optional."""
    if raw.get("prompt") is None:
        return _comparison(raw, ())
    return _comparison(raw, _with_system(raw, _dialogue(raw["prompt"], "prompt")))


def hh(raw: Raw) -> Comparison:
    """{"chosen", "rejected"}: two whole transcripts that differ in the last answer (2204.05862)."""
    return _comparison(raw, ())


def _comparison(raw: Raw, prompt: tuple[Message, ...]) -> Comparison:
    """Prompt and two responses, where each side may repeat the prompt."""
    sides = []
    for field in ("chosen", "rejected"):
        side = _dialogue(raw.get(field), field, alone="assistant")
        if side[-1].role != "assistant":
            raise ValueError(f"{field}: must end with what the assistant says")
        sides.append(side)
    chosen, rejected = sides
    if len(chosen) > 1 or len(rejected) > 1:
        if chosen[:-1] != rejected[:-1]:
            raise ValueError("rejected: the dialogue before the last answer differs from chosen's")
        # Either the whole dialogue again, or turns that go on from the prompt.
        shared = chosen[:-1]
        plain = tuple(message for message in prompt if message.role != "system")
        repeats = not prompt or shared[: len(prompt)] == prompt or shared == plain
        if not repeats:
            raise ValueError("chosen: a dialogue of several turns that does not begin with the prompt")
        prompt = prompt if shared == plain and prompt else shared
    if not prompt:
        raise ValueError("prompt: missing, and chosen/rejected are no whole dialogues")
    grade = _grade(raw)
    return Comparison(
        prompt=prompt,
        responses=(chosen[-1].content, rejected[-1].content),
        grades=() if grade is None else (grade,),
        scores=_pair_scores(raw),
        tags=tuple(raw.get("tags") or ()),
    )


def ranking(raw: Raw) -> Comparison:
    """{"prompt", "responses": best first}; "ranks" (1 = best, equal ranks are ties) for responses in another order."""
    responses = list(raw.get("responses") or ())
    if not all(isinstance(response, str) for response in responses):
        raise ValueError("responses: expected strings")
    scores = raw.get("scores")
    order = list(range(len(responses)))
    grades = tuple(raw.get("grades") or ())
    ranks = raw.get("ranks")
    if ranks is not None:
        if len(ranks) != len(responses):
            raise ValueError(f"ranks: {len(ranks)} for {len(responses)} responses")
        order.sort(key=lambda i: ranks[i])
        grades = tuple(
            TIE if ranks[order[i]] == ranks[order[j]] else None
            for i in range(len(order))
            for j in range(i + 1, len(order))
        )
    return Comparison(
        prompt=_with_system(raw, _dialogue(raw.get("prompt"), "prompt")),
        responses=tuple(responses[i] for i in order),
        grades=grades,
        scores=None if scores is None else tuple(float(scores[i]) for i in order),
        tags=tuple(raw.get("tags") or ()),
    )


def unpaired(raw: Raw) -> Label:
    """{"prompt", "response" or "completion", "desirable" or "label": true/false}, for KTO."""
    good = raw.get("desirable", raw.get("label"))
    if not isinstance(good, bool):
        raise ValueError(f"desirable: expected true or false, got {good!r}")
    prompt = _with_system(raw, _dialogue(raw.get("prompt"), "prompt"))
    answer = _dialogue(raw.get("response", raw.get("completion")), "response", alone="assistant")
    return Label((*prompt, *answer[:-1]), answer[-1].content, good)


def question_answer(raw: Raw) -> Demonstration:
    """{"question", "answer"}; as prompts, what follows `####` in the answer is the reference (GSM8K, 2110.14168)."""
    return Demonstration((Message("user", _string(raw, "question")), Message("assistant", _string(raw, "answer"))))


def prompt(raw: Raw) -> Prompt:
    """{"prompt"}, optionally "tags", "reference", "id"."""
    return Prompt(
        messages=_with_system(raw, _dialogue(raw.get("prompt"), "prompt")),
        tags=tuple(raw.get("tags") or ()),
        reference=raw.get("reference"),
        id=str(raw.get("id", "")),
    )


FORMATS: dict[str, Adapter] = {
    adapter.__name__: adapter
    for adapter in (
        text,
        alpaca,
        sharegpt,
        messages,
        prompt_completion,
        preference,
        hh,
        ranking,
        unpaired,
        question_answer,
        prompt,
    )
}


def detect(raw: Raw) -> str:
    """The format that a row's keys say it has. Raises ValueError where none fits."""
    keys = set(raw)
    if "conversations" in keys:
        return "sharegpt"
    if "messages" in keys:
        return "messages"
    if {"chosen", "rejected"} <= keys:
        whole = isinstance(raw["chosen"], str) and _TURN.match(raw["chosen"])
        return "hh" if whole and "prompt" not in keys else "preference"
    if {"prompt", "responses"} <= keys:
        return "ranking"
    if "prompt" in keys and keys & {"response", "completion"} and keys & {"desirable", "label"}:
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
    raise ValueError(f"no format fits the fields {', '.join(sorted(keys)) or '(none)'}; give one with data.format=NAME")


def find_adapter(name: str) -> Adapter | None:
    """The adapter of a format's name, of `package.module:function`, or None for auto. Raises UserError."""
    if name == "auto":
        return None
    if name in FORMATS:
        return FORMATS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise UserError(f"data.format={name}: no such format{suggest(name, [*FORMATS, 'auto'])}; or module:function")
    try:
        found: Adapter = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"data.format={name}: {error}") from error
    return found


def labels_of(comparison: Comparison) -> list[Label]:
    """The responses that win more of their pairs than they lose as good ones, those that lose more as bad ones.

    Of a pair that is the chosen and the rejected; the middle of a ranking is neither and is left out.
    """
    balance = Counter[int]()
    for better, worse, _ in comparison.pairs():
        balance[better] += 1
        balance[worse] -= 1
    return [
        Label(comparison.prompt, response, desirable=balance[i] > 0)
        for i, response in enumerate(comparison.responses)
        if balance[i] != 0 and response.strip()
    ]


def convert(record: Record, wanted: str) -> Iterable[Record]:
    """The record as the wanted type, where it holds what that needs. Raises ValueError where it does not."""
    if record.name == wanted:
        return (record,)
    if wanted == "prompt":
        if isinstance(record, Demonstration):
            last = max(i for i, message in enumerate(record.messages) if message.role == "assistant")
            answer = record.messages[last].content
            reference = answer.rpartition("####")[2].strip().replace(",", "") if "####" in answer else None
            return (Prompt(record.messages[:last], reference=reference),)
        if isinstance(record, Comparison):
            return (Prompt(record.prompt, tags=record.tags),)
        if isinstance(record, Label):
            return (Prompt(record.prompt),)
    if isinstance(record, Comparison):
        if wanted == "demonstration":
            return (Demonstration((*record.prompt, Message("assistant", record.responses[0]))),)
        if wanted == "label":
            return labels_of(record)
    if wanted == "demonstration" and isinstance(record, Label):
        return (Demonstration((*record.prompt, Message("assistant", record.response))),) if record.desirable else ()
    raise ValueError(f"holds a {record.name}, which cannot serve as a {wanted}")
