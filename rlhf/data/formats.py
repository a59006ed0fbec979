"""From the shapes in which data comes to the record types. A format is a function raw dict -> record."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from rlhf import functions
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
from rlhf.data.turns import Raw, asked, dialogue, is_transcript, message, split_system, with_system
from rlhf.errors import UserError, suggest

Adapter = Callable[[Raw], Record]

_GRADE_WORDS = {
    **{grade: grade for grade in GRADES},
    TIE: TIE,
    "significantly better": "significantly",
    "slightly better": "slightly",
    "negligibly": "negligible",
    "negligibly better": "negligible",
    "negligibly better / unsure": "negligible",
    "unsure": "negligible",
    "much better": "significantly",  # HelpSteer's strongest of three; ours for Llama 2's strongest of four
    "clearly better": "better",
    **dict.fromkeys(("equal", "equally good", "same", "about the same"), TIE),
}
_MARKS = {
    **dict.fromkeys(("true", "1", "yes", "good", "desirable", "up"), True),
    **dict.fromkeys(("false", "0", "no", "bad", "undesirable", "down"), False),
}


def _string(raw: Raw, *keys: str) -> str:
    """The first of the fields that is there, which must be a string."""
    for key in keys:
        if raw.get(key) is not None:
            if not isinstance(raw[key], str):
                raise ValueError(f"{key}: expected a string, got {type(raw[key]).__name__}")
            return str(raw[key])
    raise ValueError(f"{keys[0]}: missing")


def _cluster(raw: Raw) -> str:
    return str(raw.get("cluster") or "")


def _tags(raw: Raw) -> tuple[str, ...]:
    tags = raw.get("tags") or ()
    if isinstance(tags, str):
        return (tags,)
    if not isinstance(tags, list | tuple) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f"tags: expected a list of strings, got {tags!r}")
    return tuple(tags)


def _mark(raw: Raw, *fields: str) -> bool | None:
    """Whether the first of the fields that is there calls a reply good; None where none does, or by no known word."""
    mark = next((raw[field] for field in fields if raw.get(field) is not None), None)
    if isinstance(mark, str):
        return _MARKS.get(mark.strip().lower())
    return bool(mark) if isinstance(mark, int | float) and mark in (0, 1) else None


def _grade(raw: Raw) -> str | None:
    grade = raw.get("grade")
    if grade is None or grade == "":
        return None
    known = _GRADE_WORDS.get(str(grade).strip().lower().replace("_", " "))
    if known is None:
        raise ValueError(f"grade: {grade!r} is not one of {', '.join((*GRADES, TIE))}")
    return known


def _ended(raw: Raw) -> bool:
    """Whether the one response of a row came to its end; what says nothing of it was written by a person."""
    ended = raw.get("ended")
    if ended is not None and not isinstance(ended, bool):
        raise ValueError(f"ended: expected true or false, got {ended!r}")
    return ended is not False


def _per_response(raw: Raw, field: str, order: Sequence[int]) -> tuple[bool, ...] | None:
    """A field that is true or false for each response, in this order of them; None where there is none."""
    marks = raw.get(field)
    if marks is None:
        return None
    if not isinstance(marks, list | tuple) or not all(isinstance(mark, bool) for mark in marks):
        raise ValueError(f"{field}: expected true or false for each response, got {marks!r}")
    if len(marks) != len(order):
        raise ValueError(f"{field}: {len(marks)} for {len(order)} responses")
    return tuple(marks[index] for index in order)


def _numbers(raw: Raw, field: str) -> list[float] | None:
    """Return a field that has a number for each response; None where there is none."""
    values = raw.get(field)
    if values is None:
        return None
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError):
        raise ValueError(f"{field}: expected a number for each response, got {values!r}") from None


def _pair_scores(raw: Raw) -> tuple[float, ...] | None:
    for better, worse in (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score")):
        if raw.get(better) is not None and raw.get(worse) is not None:
            return (float(raw[better]), float(raw[worse]))
    scores = _numbers(raw, "scores")
    return None if scores is None else tuple(scores)


def text(raw: Raw) -> Text:
    """{"text"}."""
    found = _string(raw, "text", "content")
    if not found.strip():
        raise ValueError("text: empty")
    return Text(found)


def _instruction(raw: Raw) -> str:
    """What a row of the alpaca kind asks; Dolly calls the input context."""
    question = _string(raw, "instruction")
    given = next((key for key in ("input", "context") if raw.get(key)), None)
    return question if given is None else f"{question}\n{_string(raw, given)}"


def alpaca(raw: Raw) -> Demonstration | Label:
    """{"instruction", "input", "output"}, optionally "system" and "history" (pairs or messages), "kto_tag"."""
    turns: list[Message] = []
    for past in raw.get("history") or ():
        if isinstance(past, list | tuple) and len(past) == 2 and all(isinstance(said, str) for said in past):
            turns += (Message("user", past[0]), Message("assistant", past[1]))
        elif isinstance(past, Mapping):
            turns.append(message(past))
        else:
            raise ValueError(f"history: expected pairs of question and answer, got {past!r}")
    asks = with_system(raw, (*turns, Message("user", _instruction(raw))))
    return _answered(raw, (*asks, Message("assistant", _string(raw, "output", "response"))), "output")


def sharegpt(raw: Raw) -> Demonstration | Comparison | Label:
    """{"conversations": [{"from", "value"}]}, with "chosen"/"rejected" a comparison, with "label" an unpaired one."""
    return _chat(raw, "conversations")


def messages(raw: Raw) -> Demonstration | Comparison | Label:
    """{"messages": [{"role", "content"}]}, optionally "tools" and "ended"; further as sharegpt."""
    return _chat(raw, "messages")


def _chat(raw: Raw, field: str) -> Demonstration | Comparison | Label:
    if isinstance(raw.get(field), str) and not is_transcript(raw[field]):
        raise ValueError(f"{field}: expected a list of messages, got a string")
    turns = with_system(raw, dialogue(raw.get(field), field))
    if raw.get("chosen") is not None and raw.get("rejected") is not None:
        return _comparison(raw, turns)
    return _answered(raw, turns, field)


def _answered(raw: Raw, turns: tuple[Message, ...], field: str) -> Demonstration | Label:
    """A dialogue, or a marked reply where the row says whether it is good."""
    good = _mark(raw, "label", "kto_tag")
    if good is None:
        return Demonstration(turns, _ended(raw), _cluster(raw))
    if turns[-1].role != "assistant":
        raise ValueError(f"{field}: a labelled dialogue must end with the assistant")
    return Label(turns[:-1], turns[-1].content, good, _ended(raw))


def prompt_completion(raw: Raw) -> Demonstration:
    """{"prompt", "completion"}, each a string or messages ("response" and "output" are other names)."""
    field = next((key for key in ("completion", "response", "output") if key in raw), "completion")
    answer = dialogue(raw.get(field), field, alone="assistant")
    return Demonstration(with_system(raw, (*asked(raw.get("prompt")), *answer)), _ended(raw), _cluster(raw))


def preference(raw: Raw) -> Comparison:
    """{"prompt", "chosen", "rejected"} as strings, message lists, or whole dialogues.

    Optional: "grade", "scores", "cluster", and "ended" and "unsafe", which are true or false for each of the two.

    "question", or "instruction" and "input", are other names of a prompt.
    """
    if raw.get("prompt") is not None:
        return _comparison(raw, with_system(raw, asked(raw["prompt"])))
    if raw.get("instruction") is not None:
        return _comparison(raw, with_system(raw, (Message("user", _instruction(raw)),)))
    if raw.get("question") is not None:
        return _comparison(raw, with_system(raw, asked(raw["question"], "question")))
    return _comparison(raw, ())


def hh(raw: Raw) -> Comparison:
    """{"chosen", "rejected"}: two whole transcripts that differ in the last answer (2204.05862)."""
    return _comparison(raw, ())


def _comparison(raw: Raw, prompt: tuple[Message, ...]) -> Comparison:
    """Prompt and two responses, where each side may repeat the prompt."""
    sides = []
    for field in ("chosen", "rejected"):
        side = dialogue(raw.get(field), field, alone="assistant")
        if side[-1].role != "assistant":
            raise ValueError(f"{field}: must end with what the assistant says")
        sides.append(side)
    chosen, rejected = sides
    if len(chosen) > 1 or len(rejected) > 1:
        if chosen[:-1] != rejected[:-1]:
            raise ValueError("rejected: the dialogue before the last answer differs from chosen's")
        # The whole dialogue again, perhaps on from the prompt; a system message may be on either side or on both.
        (system, turns), (own, shared) = split_system(prompt), split_system(chosen[:-1])
        if shared[: len(turns)] != turns or (system and own and system != own):
            raise ValueError("chosen: a dialogue of several turns that does not begin with the prompt")
        prompt = (*(system or own), *shared)
    if not prompt:
        raise ValueError("prompt: missing, and chosen/rejected are no whole dialogues")
    grade = _grade(raw)
    return Comparison(
        prompt=prompt,
        responses=(chosen[-1].content, rejected[-1].content),
        grades=() if grade is None else (grade,),
        scores=_pair_scores(raw),
        tags=_tags(raw),
        unsafe=_per_response(raw, "unsafe", range(2)),
        ended=_per_response(raw, "ended", range(2)),
        cluster=_cluster(raw),
    )


def ranking(raw: Raw) -> Comparison:
    """{"prompt", "responses": best first}; "ranks" (1 = best, equal ranks are ties) for responses in another order.

    Optional: "grades", "scores", "cluster", and "ended" and "unsafe", which are true or false for each response.
    """
    responses = raw.get("responses") or []
    if not isinstance(responses, list | tuple) or not all(isinstance(response, str) for response in responses):
        raise ValueError("responses: expected strings")
    scores = _numbers(raw, "scores")
    order = list(range(len(responses)))
    grades = tuple(raw.get("grades") or ())
    ranks = _numbers(raw, "ranks")
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
        prompt=with_system(raw, asked(raw.get("prompt"))),
        responses=tuple(responses[i] for i in order),
        grades=grades,
        scores=None if scores is None else tuple(scores[i] for i in order),
        tags=_tags(raw),
        unsafe=_per_response(raw, "unsafe", order),
        ended=_per_response(raw, "ended", order),
        cluster=_cluster(raw),
    )


def unpaired(raw: Raw) -> Label:
    """{"prompt", "response" or "completion", "desirable", "label" or "kto_tag": true/false}, for KTO."""
    good = _mark(raw, "desirable", "label", "kto_tag")
    if good is None:
        field = next((field for field in ("desirable", "label", "kto_tag") if field in raw), "desirable")
        raise ValueError(f"{field}: expected true or false (or 1 and 0), got {raw.get(field)!r}")
    prompt = with_system(raw, asked(raw.get("prompt")))
    answer = dialogue(raw.get("response", raw.get("completion")), "response", alone="assistant")
    return Label((*prompt, *answer[:-1]), answer[-1].content, good, _ended(raw))


def question_answer(raw: Raw) -> Demonstration:
    """{"question", "answer"}; as prompts, what follows `####` in the answer is the reference (GSM8K, 2110.14168)."""
    return Demonstration((Message("user", _string(raw, "question")), Message("assistant", _string(raw, "answer"))))


def prompt(raw: Raw) -> Prompt:
    """{"prompt"}, optionally "tags", "reference" (a string or a number), "id", "cluster" (the same for paraphrases)."""
    known = raw.get("reference")
    if isinstance(known, int | float) and not isinstance(known, bool):
        known = str(known)
    if known is not None and not isinstance(known, str):
        raise ValueError(f"reference: expected a string or a number, got {type(known).__name__}")
    return Prompt(
        messages=with_system(raw, asked(raw.get("prompt"))),
        tags=_tags(raw),
        reference=known,
        id=str(raw.get("id", "")),
        cluster=_cluster(raw),
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


_SHAPES = (("messages",), ("conversations",), ("chosen", "rejected"), ("responses",), ("instruction",), ("question",))
"""Fields that tell a row's shape, where one of them is not null."""


def detect(raw: Raw) -> str:
    """The format that a row's keys say it has. Raises ValueError where none fits."""
    # Rows of several shapes in one Arrow table have the columns of all, null where a row has another shape.
    other = [field for fields in _SHAPES for field in fields if all(raw.get(field) is None for field in fields)]
    keys = set(raw) - set(other) or set(raw)
    if {"prompt", "chosen", "rejected"} <= keys:  # UltraFeedback has messages too: the chosen ones again
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
    raise ValueError(f"no format fits the fields {', '.join(sorted(keys)) or '(none)'}; give one with data.format=NAME")


def find_adapter(name: str) -> Adapter | None:
    """The adapter of a format's name, of `package.module:function`, or None for auto. Raises UserError."""
    if name == "auto":
        return None
    if name in FORMATS:
        return FORMATS[name]
    if ":" not in name:
        raise UserError(f"data.format={name}: no such format{suggest(name, [*FORMATS, 'auto'])}; or module:function")
    return functions.load("data.format", name)


def labels_of(comparison: Comparison) -> list[Label]:
    """The responses that win more of their pairs than they lose as good ones, those that lose more as bad ones.

    Of a pair that is the chosen and the rejected; the middle of a ranking is neither and is left out.
    """
    balance = Counter[int]()
    for better, worse, _ in comparison.pairs():
        balance[better] += 1
        balance[worse] -= 1
    return [
        Label(comparison.prompt, response, desirable=balance[i] > 0, ended=comparison.has_ended(i))
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
            return (Prompt(record.messages[:last], reference=reference, cluster=record.cluster),)
        if isinstance(record, Comparison):
            return (Prompt(record.prompt, tags=record.tags, cluster=record.cluster),)
        if isinstance(record, Label):
            return (Prompt(record.prompt),)
    if isinstance(record, Comparison):
        if wanted == "demonstration":
            best = Message("assistant", record.responses[0])
            return (Demonstration((*record.prompt, best), record.has_ended(0), record.cluster),)
        if wanted == "label":
            return labels_of(record)
    if wanted == "demonstration" and isinstance(record, Label):
        good = Demonstration((*record.prompt, Message("assistant", record.response)), record.ended)
        return (good,) if record.desirable else ()
    if wanted == "label" and isinstance(record, Demonstration):
        raise ValueError("label: missing, or not one of true, false, 1, 0")
    raise ValueError(f"holds a {record.name}, which cannot serve as a {wanted}")
