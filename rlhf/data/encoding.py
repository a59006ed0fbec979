"""Encoding of records to token ids and loss masks.

Prompt and response are tokenized separately; ids and mask come from one pass.
"""

from collections.abc import Iterator, Sequence

from rlhf.data.control_tokens import Tokenizer
from rlhf.data.encoded_rows import Encoded, EncodedComparison, EncodedLabel
from rlhf.data.end_tokens import cut_at_end_of_turn, end_of_text_id, end_of_turn_id, find_end_of_turn
from rlhf.data.records import Comparison, Label, Message
from rlhf.data.rendering import ChatTemplateError, control_tokens, render, tokenize


def generation_prompt_error() -> ChatTemplateError:
    """Return the error for a template that begins an assistant turn otherwise than its generation prompt does."""
    return ChatTemplateError(
        "begins an assistant turn with other text than its generation prompt, so a policy would be trained on other "
        "text than it continues"
    )


def _text_until_content(tokenizer: Tokenizer, whole: str) -> str:
    """Return the text before the content of a dialogue that the assistant opens, a default system message included."""
    prompt = [Message("user", "a")]
    start = render(tokenizer, prompt, generation_prompt=True).removeprefix(render(tokenizer, prompt))
    before, found, _ = whole.partition(start) if start else ("", "", whole)
    return before + found


def encode_text(tokenizer: Tokenizer, text: str) -> Encoded:
    """Encode plain text with the end-of-text token; every token but the first of a row is a target."""
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Encoded]:
    """Encode several texts as ``encode_text``, at less than half the cost for each."""
    end = end_of_text_id(tokenizer)
    rows = ([*ids, end] for ids in control_tokens(tokenizer).tokenize_texts(texts))
    return [Encoded(ids=ids, mask=[True] * len(ids)) for ids in rows]


def encode_dialogue(
    tokenizer: Tokenizer, messages: Sequence[Message], max_length: int | None = None, ended: bool = True
) -> Encoded:
    """Encode a dialogue in one pass: ids of the whole, mask on assistant content and its end-of-turn.

    Every assistant turn is tokenized separately from the text before it, exactly as in generation, so no token spans
    the border. Text that a template writes after end-of-turn (a newline in ChatML) is no target. Rows longer than
    max_length tokens are truncated on the right. A last turn that has not `ended` gets no end-of-turn.

    Raises:
        UserError: If the template rewrites earlier turns, since a mask over the whole would be wrong.
    """
    pieces = dialogue_pieces(tokenizer, messages, ended)
    row = _join([tokenize(tokenizer, text) for text in pieces])
    return Encoded(row.ids[:max_length], row.mask[:max_length])


def dialogue_pieces(tokenizer: Tokenizer, messages: Sequence[Message], ended: bool = True) -> list[str]:
    """Return the rendered texts of a dialogue that are tokenized separately, contexts and responses in turn.

    Raises:
        UserError: As ``encode_dialogue``.
    """
    pieces: list[str] = []
    for index, before, answer in _responses(tokenizer, messages, ended):
        if answer is None:
            raise ChatTemplateError(
                f"rewrites earlier turns (turn {index}: the dialogue does not start with its own prompt), so responses "
                "cannot be masked"
            )
        pieces += [before, answer]
    return pieces


def encode_pieces(tokenizer: Tokenizer, dialogues: Sequence[Sequence[str]]) -> list[Encoded]:
    """Encode several dialogues, given by their ``dialogue_pieces``, at half the cost of one by one."""
    ids = iter(control_tokens(tokenizer).tokenize_batch([text for pieces in dialogues for text in pieces]))
    return [_join([next(ids) for _ in pieces]) for pieces in dialogues]


def _join(pieces: Sequence[list[int]]) -> Encoded:
    """Return the row of contexts and responses in turn, of which the responses are targets."""
    ids: list[int] = []
    mask: list[bool] = []
    for index, piece in enumerate(pieces):
        ids += piece
        mask += [index % 2 == 1] * len(piece)
    return Encoded(ids=ids, mask=mask)


def _responses(
    tokenizer: Tokenizer, messages: Sequence[Message], ended: bool = True
) -> Iterator[tuple[int, str, str | None]]:
    """Yield for every assistant turn: its index, the text since the previous one, and its text up to its end.

    If the template rewrites earlier turns, the text of the turn is None and the iteration ends.
    """
    done = ""
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = render(tokenizer, messages[:index], generation_prompt=True)
        whole = render(tokenizer, messages[: index + 1])
        if not messages[:index] and not whole.startswith(prompt):
            prompt = _text_until_content(tokenizer, whole)
        if not prompt.startswith(done) or not whole.startswith(prompt):
            yield index, "", None
            return
        answer = cut_at_end_of_turn(tokenizer, whole[len(prompt) :], ended or index + 1 < len(messages))
        yield index, prompt[len(done) :], answer
        done = prompt + answer


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Return the ids of the prompt with the generation prompt, which the policy continues.

    Earlier responses are tokenized separately from the text before them, as when they were sampled and as in
    encode_dialogue, so that training and sampling use the same tokens.
    """
    text = render(tokenizer, messages, generation_prompt=True)
    ids: list[int] = []
    done = ""
    for _, before, answer in _responses(tokenizer, messages):
        if answer is None or not text.startswith(done + before + answer):
            break  # the template rewrites earlier turns: encode them as it renders them now
        ids += tokenize(tokenizer, before) + tokenize(tokenizer, answer)
        done += before + answer
    return ids + tokenize(tokenizer, text[len(done) :])


def encode_response(tokenizer: Tokenizer, text: str, ended: bool = True) -> list[int]:
    """Return the ids of a response with its end-of-turn; equal to those that encode_dialogue masks for the same text.

    A truncated response (not `ended`) has no end-of-turn, because the policy did not generate one.

    Raises:
        UserError: If the template begins an assistant turn otherwise than its generation prompt does.
    """
    end_id = end_of_turn_id(tokenizer)
    prompt = [Message("user", "a")]
    before = render(tokenizer, prompt, generation_prompt=True)
    # Rendered by the template, because some templates strip or decorate the content.
    whole = render(tokenizer, [*prompt, Message("assistant", text)])
    if not whole.startswith(before):
        raise generation_prompt_error()
    ids = tokenize(tokenizer, cut_at_end_of_turn(tokenizer, whole[len(before) :], ended))
    assert not ended or ids[-1] == end_id
    return ids


def encode_tool_turn(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids between two assistant turns: the tool's turn and the generation prompt.

    They equal those of encode_dialogue for the same dialogue. A template without a role "tool" gets a user turn.

    Raises:
        UserError: If the template can write neither.
    """
    past = [Message("user", "a"), Message("assistant", "zqxj")]
    end = find_end_of_turn(tokenizer, tokenizer.chat_template)[0]
    before = render(tokenizer, past)
    done = before[: before.index(end, before.rindex("zqxj")) + len(end)]
    whole = ""
    for role in ("tool", "user"):
        try:
            whole = render(tokenizer, [*past, Message(role, text)], generation_prompt=True)
        except Exception:  # templates raise errors of any type
            continue
        if whole.startswith(done) and control_tokens(tokenizer).guard(text) in whole:
            return tokenize(tokenizer, whole[len(done) :])
    raise ChatTemplateError("cannot render a tool's turn after an assistant turn")


def encode_turns(tokenizer: Tokenizer, turns: Sequence[Message], ended: bool = True) -> list[int]:
    """Return the ids that follow a prompt: assistant turns, each with end-of-turn, and tool turns between them.

    They equal those of encode_dialogue for the same dialogue; the last turn has no end-of-turn unless it has `ended`.
    """
    ids: list[int] = []
    for index, turn in enumerate(turns):
        if turn.role == "tool":
            ids += encode_tool_turn(tokenizer, turn.content)
        else:
            ids += encode_response(tokenizer, turn.content, ended or index + 1 < len(turns))
    return ids


def fit_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message], max_length: int | None
) -> tuple[list[int] | None, bool]:
    """Return the ids of at most max_length tokens, and whether turns were dropped.

    The ids are None if the prompt cannot fit.
    """
    fitting, ids = fit_messages(tokenizer, messages, max_length)
    return (ids if fitting is not None else None), fitting is None or len(fitting) < len(messages)


def fit_messages(
    tokenizer: Tokenizer, messages: Sequence[Message], max_length: int | None
) -> tuple[list[Message] | None, list[int]]:
    """Return the turns that make a prompt of at most max_length tokens, and its ids.

    The turns are None if the prompt cannot fit. The oldest turns are dropped first, whole ones and up to the next user
    turn, so that the dialogue stays well formed. A leading system message is kept. The last turn is never truncated: a
    prompt without its question is another prompt.
    """
    head = [message for message in messages[:1] if message.role == "system"]
    rest = list(messages[len(head) :])
    while True:
        ids = encode_prompt(tokenizer, [*head, *rest])
        if max_length is None or len(ids) <= max_length:
            return [*head, *rest], ids
        starts = [index for index, message in enumerate(rest) if message.role == "user" and index > 0]
        if not starts:
            return None, ids
        rest = rest[starts[0] :]


def encode_comparison(
    tokenizer: Tokenizer, comparison: Comparison, max_length: int | None = None, max_prompt_length: int | None = None
) -> tuple[EncodedComparison | None, bool]:
    """Encode a comparison; return it (None if it does not fit max_length tokens), and whether the prompt lost turns.

    Responses are never truncated: a truncated one loses its end-of-turn, at which a reward model is read, and often the
    very words in which two responses differ.
    """
    responses = [
        encode_response(tokenizer, response, comparison.has_ended(index))
        for index, response in enumerate(comparison.responses)
    ]
    room = _room(max_length, max_prompt_length, max(len(response) for response in responses))
    prompt, cut = fit_prompt(tokenizer, comparison.prompt, room)
    if prompt is None:
        return None, cut
    unsafe = comparison.unsafe or ()
    row = EncodedComparison(
        prompt, responses, comparison.pairs(), comparison.scores, unsafe=unsafe, cluster=comparison.cluster
    )
    return row, cut


def encode_label(
    tokenizer: Tokenizer, label: Label, max_length: int | None = None, max_prompt_length: int | None = None
) -> tuple[EncodedLabel | None, bool]:
    """Encode an unpaired response as ``encode_comparison`` does a comparison."""
    response = encode_response(tokenizer, label.response, label.ended)
    prompt, cut = fit_prompt(tokenizer, label.prompt, _room(max_length, max_prompt_length, len(response)))
    if prompt is None:
        return None, cut
    return EncodedLabel(prompt, response, label.desirable), cut


def _room(max_length: int | None, max_prompt_length: int | None, response: int) -> int | None:
    limits = [
        limit
        for limit in (max_prompt_length, None if max_length is None else max_length - response)
        if limit is not None
    ]
    return min(limits) if limits else None
