"""Chat template and masks: prompt and answer are tokenised apart, ids and mask come out of one pass."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jinja2

from rlhf.data.chat_templates import TEMPLATES
from rlhf.data.control_tokens import ControlTokens
from rlhf.data.records import Comparison, Label, Message
from rlhf.errors import UserError, first_line
from rlhf.time_limit import memory_limit, time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any

CHAT_TEMPLATE = TEMPLATES["plain"]
"""Template of tokenizers trained here: `<|user|>..<|end|><|assistant|>..<|end|>`, no newlines, no default system."""

CHATML_TEMPLATE = TEMPLATES["chatml"]
"""ChatML without a default system message."""

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one row; mask[t] is True where ids[t] is a target that counts in the loss.

    `positions` is set for packed rows only (it restarts at 0 with each document); None means 0, 1, 2, ...
    """

    ids: list[int]
    mask: list[bool]
    positions: list[int] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __reduce__(self) -> tuple[Any, ...]:
        # Dataclasses with slots pickle field by field, in Python: a fifth of the time of streaming.
        return Encoded, (self.ids, self.mask, self.positions)

    def windows(self, length: int) -> list["Encoded"]:
        """Return rows of at most ``length`` tokens, each beginning with the last token of the one before.

        So every target but the first token is a target of one row, and of no other.
        """
        cuts = range(0, max(len(self.ids) - 1, 1), max(length - 1, 1))
        return [
            Encoded(self.ids[i : i + length], [i == 0 and self.mask[0], *self.mask[i + 1 : i + length]]) for i in cuts
        ]


@dataclass(frozen=True, slots=True)
class EncodedComparison:
    """A comparison in tokens: prompt [P], K responses [R_k], each ending with end-of-turn unless it was cut off.

    `pairs` are (better, worse, grade) as in Comparison.pairs(). `reference` is the reference policy's log-probability
    of each response that is in a pair, by its index: computed once, since neither it nor the data changes.
    `embedding` is a vector [E] of the prompt, where an objective asks for one. `unsafe` says of each response whether
    it does harm; it is empty where no response has such a label. `cluster` is the comparison's.
    """

    prompt: list[int]
    responses: list[list[int]]
    pairs: list[tuple[int, int, str | None]]
    scores: tuple[float, ...] | None = None
    reference: dict[int, float] | None = None
    embedding: Any = None
    unsafe: tuple[bool, ...] = ()
    cluster: str = ""

    @property
    def used(self) -> list[int]:
        """Indices of the responses that are in a pair, in order: the rows a batch has of it."""
        return sorted({index for pair in self.pairs for index in pair[:2]})

    def __len__(self) -> int:
        return len(self.prompt) + max(len(response) for response in self.responses)


@dataclass(frozen=True, slots=True)
class EncodedLabel:
    """An unpaired answer in tokens.

    `mismatched` is the response to another prompt (the KL estimate of KTO reads it after this one's prompt); the two
    references are the reference policy's log-probabilities of `response` and of `mismatched`, computed once.
    `embedding` is a vector [E] of the prompt, where an objective asks for one.
    """

    prompt: list[int]
    response: list[int]
    desirable: bool
    mismatched: list[int] | None = None
    reference: float | None = None
    mismatched_reference: float | None = None
    embedding: Any = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


RENDER_SECONDS = 5.0  # for one dialogue, which takes milliseconds
RENDER_BYTES = 2**30  # for one dialogue, which takes kilobytes
RENDER_CHARACTERS = 1_000_000  # of one dialogue beside what its turns say
_ENDLESS = f"the chat template takes longer than {RENDER_SECONDS:g} s for one dialogue; type model.chat_template=chatml"
_TOO_LARGE = "the chat template makes a text without end of one dialogue; type model.chat_template=chatml"


class Unbounded(UserError):
    """A chat template that takes more time, memory or text than any dialogue needs."""


class Refused(UserError):
    """A dialogue that the chat template cannot write: two user turns in a row where it wants them to alternate, say."""


_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # a tag of transformers' own


def check_syntax(chat_template: str) -> None:
    """Raises UserError for a text that is no Jinja template."""
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", chat_template))
    except jinja2.TemplateSyntaxError as error:
        raise _no_jinja(error) from None


def _no_jinja(error: jinja2.TemplateSyntaxError) -> UserError:
    return UserError(
        f"the chat template is no Jinja template (line {error.lineno}: {error}); mend the file, or type "
        "model.chat_template=chatml"
    )


def render(tokenizer: Tokenizer, messages: Sequence[Message], generation_prompt: bool = False) -> str:
    """Return the dialogue as the template writes it, its special tokens included as text.

    Control tokens that the messages spell have a mark inside (``ControlTokens.guard``), so that ``tokenize`` reads
    them as text.
    """
    controls = control_tokens(tokenizer)
    turns = [Message(message.role, controls.guard(message.content)) for message in messages]
    return _rendered(tokenizer, turns, generation_prompt)


_RAISED = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def _rendered(tokenizer: Tokenizer, messages: Sequence[Message], generation_prompt: bool = False) -> str:
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template, chat data needs one; type model.chat_template=chatml")
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        with time_limit(RENDER_SECONDS, _ENDLESS, Unbounded):
            # A list of dialogues, because transformers refuses a single one without turns; templates often write it.
            found = tokenizer.apply_chat_template([turns], tokenize=False, add_generation_prompt=generation_prompt)
        text = str(found[0])
        # A template may write what is said several times, as plain text and as JSON for example.
        if len(text) > RENDER_CHARACTERS + 100 * sum(len(message.content) for message in messages):
            raise Unbounded(_TOO_LARGE)
        return text
    except MemoryError:
        raise Unbounded(_TOO_LARGE) from None
    except jinja2.TemplateSyntaxError as error:
        raise _no_jinja(error) from None
    except _RAISED as error:
        roles = ", ".join(message.role for message in messages) or "(none)"
        reason = first_line(error)
        raise Refused(
            f"the chat template cannot write a dialogue of the turns {roles} ({reason}); "
            "type model.chat_template=chatml"
        ) from None


def control_tokens(tokenizer: Tokenizer) -> ControlTokens:
    """Return the control tokens of a tokenizer: special ones, and added ones that its chat template writes."""
    # Tokens are added, and roles such as padding given, after a tokenizer is made.
    return _control_tokens(tokenizer, tokenizer.chat_template, len(tokenizer), tuple(tokenizer.all_special_tokens))


@lru_cache(maxsize=8)
def _control_tokens(
    tokenizer: Tokenizer, chat_template: str | None, size: int, special: tuple[str, ...]
) -> ControlTokens:
    written = ""
    if chat_template:
        turns = [Message("user", "a"), Message("assistant", "a"), Message("user", "a")]
        for dialogue in (turns[:1], turns, [Message("system", "a"), *turns]):
            # The first use of a template: its memory is limited here and not for every row, which would cost time.
            try:
                with memory_limit(RENDER_BYTES):
                    written += _rendered(tokenizer, dialogue, generation_prompt=True)
            except Unbounded:
                raise
            except UserError:  # said where the template is used
                pass
    return ControlTokens(tokenizer, written)


def tokenize(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a piece of rendered text; nothing is added before or after it."""
    return control_tokens(tokenizer).tokenize(text)


def tokenize_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of text from the data, in which a spelled control token is no more than text."""
    controls = control_tokens(tokenizer)
    return controls.tokenize(controls.guard(text))


@lru_cache(maxsize=8)
def _end_of_turn(tokenizer: Tokenizer, chat_template: str) -> tuple[str, int, str]:
    """Return the end-of-turn token, its id, and what the template writes between the content and it."""
    mark = "zqxj"
    text = render(tokenizer, [Message("user", "a"), Message("assistant", mark)])
    if mark not in text:
        raise UserError("the chat template does not write what the assistant says; type model.chat_template=chatml")
    tail = text[text.rindex(mark) + len(mark) :]
    special = set(tokenizer.all_special_ids) | {
        index for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special
    }
    for index in tokenize(tokenizer, tail):
        if index in special:
            token = str(tokenizer.convert_ids_to_tokens(index))
            return token, index, tail.partition(token)[0]
    raise UserError(
        "the chat template ends an assistant turn with no special token, so a policy could never learn to stop; "
        "type model.chat_template=chatml"
    )


_NO_START = (
    "the chat template's generation prompt is not how it begins an assistant turn, so a policy would be trained on "
    "other text than it is asked to continue; type model.chat_template=chatml"
)


def _until_start(tokenizer: Tokenizer, whole: str) -> str:
    """What precedes the first words of a dialogue that the assistant opens, a default system message for example."""
    asked = [Message("user", "a")]
    start = render(tokenizer, asked, generation_prompt=True).removeprefix(render(tokenizer, asked))
    before, found, _ = whole.partition(start) if start else ("", "", whole)
    return before + found


def _until_end(tokenizer: Tokenizer, turn: str, ended: bool = True) -> str:
    """Cut a rendered assistant turn behind its end-of-turn token; one that was cut off, behind its content.

    What the template writes between content and end-of-turn (Llama 2: a space) belongs to the end.
    """
    end, _, closing = _end_of_turn(tokenizer, tokenizer.chat_template)
    if end not in turn:
        raise UserError(
            f"the chat template does not end every assistant turn with {end}, so a policy would not learn to stop; "
            "type model.chat_template=chatml"
        )
    return turn[: turn.rindex(end) + len(end)] if ended else turn[: turn.rindex(end)].removesuffix(closing)


def check_template(tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
    """Whether the chat template can be trained with, for dialogues with the roles of this one.

    Raises UserError, one line, for a template that leaves out what a role says, does not end every assistant turn with
    the same token, begins an assistant turn otherwise than the generation prompt does, or rewrites earlier turns. Each
    set of roles is tried once, on words of our own. What the template refuses is left to the dialogue itself.
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
                raise UserError(
                    f"the chat template leaves out what the {message.role} says (role {message.role}); "
                    "type model.chat_template=chatml, or a Jinja file that writes it"
                )
        alone = dialogue[: roles.index("assistant") + 1]
        if not render(tokenizer, alone).startswith(render(tokenizer, alone[:-1], generation_prompt=True)):
            raise UserError(_NO_START)
        ends = [index for index, role in enumerate(roles) if role == "assistant"]
        for index, place in enumerate(ends):
            start = text.index(dialogue[place].content)
            stop = text.index(dialogue[place + 1].content) if index + 1 < len(ends) else len(text)
            _until_end(tokenizer, text[start:stop])
        encode_dialogue(tokenizer, dialogue)
    except Refused:
        return


def end_of_turn_id(tokenizer: Tokenizer) -> int:
    """Id of the special token that the chat template writes after an assistant turn."""
    render(tokenizer, [Message("user", "a")])  # a missing template is reported before the cache key needs it
    return _end_of_turn(tokenizer, tokenizer.chat_template)[1]


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Id of the token that ends a document of plain text: <|endoftext|> if the vocabulary has it, else eos."""
    index = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    if isinstance(index, int) and index != tokenizer.unk_token_id:
        return index
    if isinstance(index, int) and tokenizer.convert_ids_to_tokens(index) == END_OF_TEXT:
        return index  # SmolLM2 calls its <|endoftext|> the unknown token
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has neither <|endoftext|> nor an eos token; give another model.tokenizer")
    return int(tokenizer.eos_token_id)


def encode_text(tokenizer: Tokenizer, text: str) -> Encoded:
    """Plain text with the end-of-text token; every token but the first of a row is a target."""
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Encoded]:
    """As ``encode_text``, for several texts at once, which costs less than half for each."""
    end = end_of_text_id(tokenizer)
    rows = ([*ids, end] for ids in control_tokens(tokenizer).tokenize_texts(texts))
    return [Encoded(ids=ids, mask=[True] * len(ids)) for ids in rows]


def encode_dialogue(
    tokenizer: Tokenizer, messages: Sequence[Message], max_length: int | None = None, ended: bool = True
) -> Encoded:
    """One pass over a dialogue: ids of the whole, mask on what the assistant says and on its end-of-turn.

    Every assistant turn is tokenised apart from what precedes it, exactly as generation sees it, so no token spans
    the border. What a template writes after end-of-turn (a newline in ChatML) is no target. Rows longer than
    max_length tokens are cut at the right. A last turn that has not `ended` gets no end-of-turn.
    Raises UserError when the template does not only append (then a mask over the whole would be wrong).
    """
    ids: list[int] = []
    mask: list[bool] = []
    for index, before, answer in _replies(tokenizer, messages, ended):
        if answer is None:
            raise UserError(
                f"the chat template rewrites earlier turns (turn {index}: the dialogue does not start with its own "
                "prompt), so answers cannot be masked; give a template that only appends: model.chat_template=chatml"
            )
        context, target = tokenize(tokenizer, before), tokenize(tokenizer, answer)
        ids += context + target
        mask += [False] * len(context) + [True] * len(target)
    return Encoded(ids=ids[:max_length], mask=mask[:max_length])


def _replies(
    tokenizer: Tokenizer, messages: Sequence[Message], ended: bool = True
) -> Iterator[tuple[int, str, str | None]]:
    """Every turn of the assistant: its number, what stands between the one before and it, and what it says to its end.

    The last is None, and nothing follows, where the template rewrites what it wrote of earlier turns.
    """
    done = ""
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = render(tokenizer, messages[:index], generation_prompt=True)
        whole = render(tokenizer, messages[: index + 1])
        if not messages[:index] and not whole.startswith(prompt):
            prompt = _until_start(tokenizer, whole)
        if not prompt.startswith(done) or not whole.startswith(prompt):
            yield index, "", None
            return
        answer = _until_end(tokenizer, whole[len(prompt) :], ended or index + 1 < len(messages))
        yield index, prompt[len(done) :], answer
        done = prompt + answer


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of the prompt with the generation prompt: what the policy continues.

    Earlier replies are tokenised apart from what precedes them, as they were when they were sampled and as
    encode_dialogue does, so that training and sampling read the same tokens.
    """
    text = render(tokenizer, messages, generation_prompt=True)
    ids: list[int] = []
    done = ""
    for _, before, answer in _replies(tokenizer, messages):
        if answer is None or not text.startswith(done + before + answer):
            break  # the template rewrites earlier turns: they are read as it writes them now
        ids += tokenize(tokenizer, before) + tokenize(tokenizer, answer)
        done += before + answer
    return ids + tokenize(tokenizer, text[len(done) :])


def encode_response(tokenizer: Tokenizer, text: str, ended: bool = True) -> list[int]:
    """Ids of a response that ends with end-of-turn; equal to what encode_dialogue masks for the same text.

    One that was cut off (not `ended`) has no end-of-turn, which the policy never wrote.
    """
    end_id = end_of_turn_id(tokenizer)
    prompt = [Message("user", "a")]
    before = render(tokenizer, prompt, generation_prompt=True)
    # Through the template, because some templates strip or decorate what the assistant says.
    whole = render(tokenizer, [*prompt, Message("assistant", text)])
    if not whole.startswith(before):
        raise UserError(_NO_START)
    ids = tokenize(tokenizer, _until_end(tokenizer, whole[len(before) :], ended))
    assert not ended or ids[-1] == end_id
    return ids


def encode_tool_turn(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids that stand between an assistant turn's end and the next assistant turn: a tool's turn, generation prompt.

    What encode_dialogue writes there for the same dialogue. A template that knows no role "tool" gets a user's turn.
    """
    past = [Message("user", "a"), Message("assistant", "zqxj")]
    end = _end_of_turn(tokenizer, tokenizer.chat_template)[0]
    before = render(tokenizer, past)
    done = before[: before.index(end, before.rindex("zqxj")) + len(end)]
    whole = ""
    for role in ("tool", "user"):
        try:
            whole = render(tokenizer, [*past, Message(role, text)], generation_prompt=True)
        except Exception:  # templates raise what they like
            continue
        if whole.startswith(done) and control_tokens(tokenizer).guard(text) in whole:
            return tokenize(tokenizer, whole[len(done) :])
    raise UserError(
        "the chat template cannot write a tool's turn after an assistant's; type model.chat_template=chatml"
    )


def encode_turns(tokenizer: Tokenizer, turns: Sequence[Message], ended: bool = True) -> list[int]:
    """Ids of what follows a prompt: turns of the assistant, each ending with end-of-turn, and of tools between them.

    What encode_dialogue writes there for the same dialogue; the last turn has no end-of-turn unless it has `ended`.
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
    """(ids of at most max_length tokens, whether turns were left out); ids is None where it cannot fit."""
    fitting, ids = fit_messages(tokenizer, messages, max_length)
    return (ids if fitting is not None else None), fitting is None or len(fitting) < len(messages)


def fit_messages(
    tokenizer: Tokenizer, messages: Sequence[Message], max_length: int | None
) -> tuple[list[Message] | None, list[int]]:
    """(turns that make a prompt of at most max_length tokens, its ids); the turns are None where it cannot fit.

    The oldest turns go first, whole ones and up to the next user turn, so the template stays well formed. A leading
    system message is kept. The last turn is never cut: a prompt without its question is another prompt.
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
    """(comparison in tokens, whether the prompt lost turns); None where it does not fit max_length tokens.

    Responses are never cut: a cut one loses its end-of-turn, which is what a reward model reads, and often the very
    words in which two responses differ.
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
    """As encode_comparison, for one unpaired response."""
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
