"""Data formats: functions that convert a raw dict to a record."""

from collections.abc import Callable, Mapping

from rlhf.data.records import (
    TIE,
    Comparison,
    Demonstration,
    Label,
    Message,
    Prompt,
    Record,
    Text,
)
from rlhf.data.row_fields import (
    read_cluster,
    read_ended,
    read_grade,
    read_mark,
    read_marks,
    read_numbers,
    read_pair_scores,
    read_string,
    read_tags,
)
from rlhf.data.turns import Raw, is_transcript, parse_dialogue, parse_message, parse_prompt, split_system, with_system

Adapter = Callable[[Raw], Record]


def text(raw: Raw) -> Text:
    """Convert {"text"} (or "content") to a text."""
    found = read_string(raw, "text", "content")
    if not found.strip():
        raise ValueError("text: empty")
    return Text(found)


def _instruction(raw: Raw) -> str:
    """Return the prompt of a row in alpaca format; Dolly calls the input "context"."""
    question = read_string(raw, "instruction")
    given = next((key for key in ("input", "context") if raw.get(key)), None)
    return question if given is None else f"{question}\n{read_string(raw, given)}"


def alpaca(raw: Raw) -> Demonstration | Label:
    """Convert {"instruction", "input", "output"} to a demonstration.

    Optional: "system", "history" (pairs or messages), and "kto_tag" or "label", which makes it an unpaired response.
    """
    turns: list[Message] = []
    for past in raw.get("history") or ():
        if isinstance(past, list | tuple) and len(past) == 2 and all(isinstance(turn, str) for turn in past):
            turns += (Message("user", past[0]), Message("assistant", past[1]))
        elif isinstance(past, Mapping):
            turns.append(parse_message(past))
        else:
            raise ValueError(f"history: expected pairs of question and answer, got {past!r}")
    dialogue = with_system(raw, (*turns, Message("user", _instruction(raw))))
    return _answered(raw, (*dialogue, Message("assistant", read_string(raw, "output", "response"))), "output")


def sharegpt(raw: Raw) -> Demonstration | Comparison | Label:
    """Convert {"conversations": [{"from", "value"}]} to a demonstration.

    With "chosen" and "rejected" it is a comparison, with "label" an unpaired response.
    """
    return _chat(raw, "conversations")


def messages(raw: Raw) -> Demonstration | Comparison | Label:
    """Convert {"messages": [{"role", "content"}]} to a demonstration.

    Optional: "tools" and "ended", and the fields of sharegpt.
    """
    return _chat(raw, "messages")


def _chat(raw: Raw, field: str) -> Demonstration | Comparison | Label:
    if isinstance(raw.get(field), str) and not is_transcript(raw[field]):
        raise ValueError(f"{field}: expected a list of messages, got a string")
    turns = with_system(raw, parse_dialogue(raw.get(field), field))
    if raw.get("chosen") is not None and raw.get("rejected") is not None:
        return _comparison(raw, turns)
    return _answered(raw, turns, field)


def _answered(raw: Raw, turns: tuple[Message, ...], field: str) -> Demonstration | Label:
    """Return a demonstration, or a label if the row marks the response as good or bad."""
    good = read_mark(raw, "label", "kto_tag")
    if good is None:
        return Demonstration(turns, read_ended(raw), read_cluster(raw))
    if turns[-1].role != "assistant":
        raise ValueError(f"{field}: a labelled dialogue must end with an assistant turn")
    return Label(turns[:-1], turns[-1].content, good, read_ended(raw))


def prompt_completion(raw: Raw) -> Demonstration:
    """Convert {"prompt", "completion"}, each a string or messages, to a demonstration.

    "response" and "output" are other names of "completion".
    """
    field = next((key for key in ("completion", "response", "output") if key in raw), "completion")
    answer = parse_dialogue(raw.get(field), field, alone="assistant")
    return Demonstration(
        with_system(raw, (*parse_prompt(raw.get("prompt")), *answer)), read_ended(raw), read_cluster(raw)
    )


def preference(raw: Raw) -> Comparison:
    """Convert {"prompt", "chosen", "rejected"} as strings, message lists or whole dialogues to a comparison.

    Optional: "grade", "scores", "cluster", and "ended" and "unsafe", which are booleans for each of the two responses.

    "question", or "instruction" and "input", are other names of the prompt.
    """
    if raw.get("prompt") is not None:
        return _comparison(raw, with_system(raw, parse_prompt(raw["prompt"])))
    if raw.get("instruction") is not None:
        return _comparison(raw, with_system(raw, (Message("user", _instruction(raw)),)))
    if raw.get("question") is not None:
        return _comparison(raw, with_system(raw, parse_prompt(raw["question"], "question")))
    return _comparison(raw, ())


def hh(raw: Raw) -> Comparison:
    """Convert {"chosen", "rejected"}, two whole transcripts that differ in the last response (2204.05862)."""
    return _comparison(raw, ())


def _comparison(raw: Raw, prompt: tuple[Message, ...]) -> Comparison:
    """Return the comparison of a prompt and two responses, where each side may repeat the prompt."""
    sides = []
    for field in ("chosen", "rejected"):
        side = parse_dialogue(raw.get(field), field, alone="assistant")
        if side[-1].role != "assistant":
            raise ValueError(f"{field}: must end with an assistant turn")
        sides.append(side)
    chosen, rejected = sides
    if len(chosen) > 1 or len(rejected) > 1:
        if chosen[:-1] != rejected[:-1]:
            raise ValueError("rejected: the dialogue before the last response differs from that of chosen")
        # The sides repeat the dialogue, and may extend the prompt; either or both may have the system message.
        (system, turns), (own, shared) = split_system(prompt), split_system(chosen[:-1])
        if shared[: len(turns)] != turns or (system and own and system != own):
            raise ValueError("chosen: has several turns, but does not begin with the prompt")
        prompt = (*(system or own), *shared)
    if not prompt:
        raise ValueError("prompt: missing, and chosen and rejected are not whole dialogues")
    grade = read_grade(raw)
    return Comparison(
        prompt=prompt,
        responses=(chosen[-1].content, rejected[-1].content),
        grades=() if grade is None else (grade,),
        scores=read_pair_scores(raw),
        tags=read_tags(raw),
        unsafe=read_marks(raw, "unsafe", range(2)),
        ended=read_marks(raw, "ended", range(2)),
        cluster=read_cluster(raw),
    )


def ranking(raw: Raw) -> Comparison:
    """Convert {"prompt", "responses": best first} to a comparison.

    "ranks" (1 = best, equal ranks are ties) allows responses in another order. Optional: "grades", "scores", "cluster",
    and "ended" and "unsafe", which are booleans for each response.
    """
    responses = raw.get("responses") or []
    if not isinstance(responses, list | tuple) or not all(isinstance(response, str) for response in responses):
        raise ValueError("responses: expected strings")
    scores = read_numbers(raw, "scores")
    order = list(range(len(responses)))
    grades = tuple(raw.get("grades") or ())
    ranks = read_numbers(raw, "ranks")
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
        prompt=with_system(raw, parse_prompt(raw.get("prompt"))),
        responses=tuple(responses[i] for i in order),
        grades=grades,
        scores=None if scores is None else tuple(scores[i] for i in order),
        tags=read_tags(raw),
        unsafe=read_marks(raw, "unsafe", order),
        ended=read_marks(raw, "ended", order),
        cluster=read_cluster(raw),
    )


def unpaired(raw: Raw) -> Label:
    """Convert {"prompt", "response", "desirable": true/false} to a label, for KTO.

    "completion" is another name of "response"; "label" and "kto_tag" are other names of "desirable".
    """
    good = read_mark(raw, "desirable", "label", "kto_tag")
    if good is None:
        field = next((field for field in ("desirable", "label", "kto_tag") if field in raw), "desirable")
        raise ValueError(f"{field}: expected true or false (or 1 and 0), got {raw.get(field)!r}")
    prompt = with_system(raw, parse_prompt(raw.get("prompt")))
    answer = parse_dialogue(raw.get("response", raw.get("completion")), "response", alone="assistant")
    return Label((*prompt, *answer[:-1]), answer[-1].content, good, read_ended(raw))


def question_answer(raw: Raw) -> Demonstration:
    """Convert {"question", "answer"} to a demonstration.

    As a prompt, its reference is the text after `####` in the answer (GSM8K, 2110.14168).
    """
    return Demonstration(
        (Message("user", read_string(raw, "question")), Message("assistant", read_string(raw, "answer")))
    )


def prompt(raw: Raw) -> Prompt:
    """Convert {"prompt"} to a prompt.

    Optional: "tags", "reference" (a string or a number), "id", and "cluster" (equal for paraphrases).
    """
    known = raw.get("reference")
    if isinstance(known, int | float) and not isinstance(known, bool):
        known = str(known)
    if known is not None and not isinstance(known, str):
        raise ValueError(f"reference: expected a string or a number, got {type(known).__name__}")
    return Prompt(
        messages=with_system(raw, parse_prompt(raw.get("prompt"))),
        tags=read_tags(raw),
        reference=known,
        id=str(raw.get("id", "")),
        cluster=read_cluster(raw),
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
