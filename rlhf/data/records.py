"""Record types, the result of every data format, and their JSON-lines forms."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

__all__ = [
    "Comparison",
    "Demonstration",
    "GRADES",
    "Label",
    "Message",
    "Prompt",
    "RECORDS",
    "ROLES",
    "Record",
    "RecordName",
    "TIE",
    "Text",
    "cluster_key",
]


# How much the first response of a pair is better, weakest first; Llama 2 (2307.09288), section 3.2.1.
GRADES = ("negligible", "slightly", "better", "significantly")

# Grade of a pair whose responses are equally good: it makes no training pair.
TIE = "tie"

ROLES = ("system", "user", "assistant", "tool")

# Largest absolute score; differences of larger ones are infinite in float32, which objectives compute in.
LARGEST_SCORE = 1e30

Json = dict[str, Any]
RecordName = Literal["text", "demonstration", "comparison", "prompt", "label"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialogue."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role is {self.role!r}, expected one of {', '.join(ROLES)}")

    def to_json(self) -> Json:
        """Return the role/content dict."""
        return {"role": self.role, "content": self.content}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Message":
        """Build a message from a role/content dict."""
        return cls(role=raw["role"], content=raw["content"])


def messages_from_json(raw: object) -> tuple[Message, ...]:
    """Return messages from a list of role/content dicts, or from one string (a single user turn)."""
    if isinstance(raw, str):
        return (Message("user", raw),)
    if not isinstance(raw, list | tuple):
        raise ValueError(f"expected a string or a list of messages, got {type(raw).__name__}")
    return tuple(Message.from_json(message) for message in raw)


def _messages_to_json(messages: tuple[Message, ...]) -> list[Json]:
    return [message.to_json() for message in messages]


def _ended_to_json(ended: bool) -> Json:
    """Return the JSON field of a truncated response; complete ones, the usual case, have none."""
    return {} if ended else {"ended": False}


@dataclass(frozen=True, slots=True)
class Text:
    """Document for pretraining and for the pretraining term of PPO."""

    name: ClassVar[RecordName] = "text"
    text: str

    def __reduce__(self) -> tuple[Any, ...]:  # pickling field by field would slow streaming down
        return Text, (self.text,)

    def to_json(self) -> Json:
        """Return the JSON-lines form."""
        return {"text": self.text}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Text":
        """Build a text from its JSON-lines form."""
        return cls(text=raw["text"])


@dataclass(frozen=True, slots=True)
class Demonstration:
    """Dialogue whose assistant turns are imitated.

    `ended` is False if the last turn was truncated at a length limit: its end is then no target. Text written by a
    person is complete. Demonstrations whose prompts ask the same in other words share a `cluster`.
    """

    name: ClassVar[RecordName] = "demonstration"
    messages: tuple[Message, ...]
    ended: bool = True
    cluster: str = ""

    def __post_init__(self) -> None:
        if not any(message.role == "assistant" and message.content.strip() for message in self.messages):
            raise ValueError("a demonstration needs an assistant turn that is not empty")
        if not self.ended and self.messages[-1].role != "assistant":
            raise ValueError(f"ended: false, but the last turn is of the {self.messages[-1].role}")

    def to_json(self) -> Json:
        """Return the JSON-lines form; default values are omitted."""
        raw = {"messages": _messages_to_json(self.messages), **_ended_to_json(self.ended)}
        return raw | ({"cluster": self.cluster} if self.cluster else {})

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Demonstration":
        """Build a demonstration from its JSON-lines form."""
        ended = bool(raw.get("ended", True))
        return cls(messages=messages_from_json(raw["messages"]), ended=ended, cluster=raw.get("cluster", ""))


@dataclass(frozen=True, slots=True)
class Comparison:
    """K >= 2 responses to one prompt, best first; K = 2 is the usual chosen/rejected pair.

    `grades` has one entry per pair (i, j), i < j, in the order (0,1), (0,2), ..., (1,2), ...: a name from GRADES, TIE,
    or None if unknown. Empty means None for all. `scores` are optional numbers per response (gold or reward-model
    scores) on any scale, as the annotator saw them. `tags` are the prompt's. `unsafe` marks for each response whether
    it does harm; None if unlabelled (the tags of the prompt are no such label). `ended` is False for each response that
    was truncated at a length limit; None means that all are complete. `cluster` is the prompt's: comparisons whose
    prompts ask the same in other words share it.
    """

    name: ClassVar[RecordName] = "comparison"
    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    grades: tuple[str | None, ...] = ()
    scores: tuple[float, ...] | None = None
    tags: tuple[str, ...] = ()
    unsafe: tuple[bool, ...] | None = None
    ended: tuple[bool, ...] | None = None
    cluster: str = ""

    def __post_init__(self) -> None:
        k = len(self.responses)
        if not self.prompt:
            raise ValueError("a comparison needs a prompt")
        if k < 2:
            raise ValueError(f"a comparison needs at least 2 responses, got {k}")
        if self.grades and len(self.grades) != k * (k - 1) // 2:
            raise ValueError(f"{k} responses make {k * (k - 1) // 2} pairs, got {len(self.grades)} grades")
        for grade in self.grades:
            if grade is not None and grade != TIE and grade not in GRADES:
                raise ValueError(f"grade is {grade!r}, expected one of {', '.join((*GRADES, TIE))}")
        if self.scores is not None and len(self.scores) != k:
            raise ValueError(f"{k} responses, but {len(self.scores)} scores")
        if not all(math.isfinite(score) for score in self.scores or ()):
            raise ValueError(f"scores: {list(self.scores or ())} are not all finite numbers")
        if not all(abs(score) <= LARGEST_SCORE for score in self.scores or ()):
            raise ValueError(f"scores: {list(self.scores or ())} are not all within {LARGEST_SCORE:g} of 0")
        if self.unsafe is not None and len(self.unsafe) != k:
            raise ValueError(f"{k} responses, but {len(self.unsafe)} marks in unsafe")
        if self.ended is not None and len(self.ended) != k:
            raise ValueError(f"{k} responses, but {len(self.ended)} marks in ended")

    def has_ended(self, index: int) -> bool:
        """Return whether a response is complete, rather than truncated at a length limit."""
        return self.ended is None or self.ended[index]

    def pairs(self) -> list[tuple[int, int, str | None]]:
        """Return (index of the better, index of the worse, grade) per pair, without ties and pairs of equal texts."""
        k = len(self.responses)
        indices = [(i, j) for i in range(k) for j in range(i + 1, k)]
        grades = self.grades or (None,) * len(indices)
        return [
            (i, j, grade)
            for (i, j), grade in zip(indices, grades, strict=True)
            # A pair of equal texts has no gradient and keeps its loss at log 2.
            if grade != TIE and self.responses[i] != self.responses[j]
        ]

    def to_json(self) -> Json:
        """Return the JSON-lines form: chosen/rejected for K = 2, else a list of responses; defaults are omitted."""
        raw: Json = {"prompt": _messages_to_json(self.prompt)}
        if len(self.responses) == 2:
            raw |= {"chosen": self.responses[0], "rejected": self.responses[1]}
            if self.grades:
                raw["grade"] = self.grades[0]
        else:
            raw["responses"] = list(self.responses)
            if self.grades:
                raw["grades"] = list(self.grades)
        if self.scores is not None:
            raw["scores"] = list(self.scores)
        if self.tags:
            raw["tags"] = list(self.tags)
        if self.unsafe is not None:
            raw["unsafe"] = list(self.unsafe)
        if self.ended is not None:
            raw["ended"] = list(self.ended)
        if self.cluster:
            raw["cluster"] = self.cluster
        return raw

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Comparison":
        """Build a comparison from its JSON-lines form."""
        if "responses" in raw:
            responses, grades = tuple(raw["responses"]), tuple(raw.get("grades") or ())
        else:
            responses = (raw["chosen"], raw["rejected"])
            grades = () if raw.get("grade") is None else (raw["grade"],)
        scores, unsafe, ended = raw.get("scores"), raw.get("unsafe"), raw.get("ended")
        return cls(
            prompt=messages_from_json(raw["prompt"]),
            responses=responses,
            grades=grades,
            scores=None if scores is None else tuple(float(score) for score in scores),
            tags=tuple(raw.get("tags") or ()),
            unsafe=None if unsafe is None else tuple(bool(mark) for mark in unsafe),
            ended=None if ended is None else tuple(bool(mark) for mark in ended),
            cluster=raw.get("cluster", ""),
        )


@dataclass(frozen=True, slots=True)
class Prompt:
    """Prompt of a policy in rollout stages.

    `tags` may contain "unsafe"; `reference` is a known answer, if any. Prompts that ask the same in other words share a
    `cluster`, by which standard errors of means are clustered.
    """

    name: ClassVar[RecordName] = "prompt"
    messages: tuple[Message, ...]
    tags: tuple[str, ...] = ()
    reference: str | None = None
    id: str = ""
    cluster: str = ""

    def __post_init__(self) -> None:
        if not self.messages:
            raise ValueError("a prompt needs at least one message")
        if self.messages[-1].role == "assistant":
            raise ValueError("a prompt must not end with an assistant turn")

    @property
    def unsafe(self) -> bool:
        """Return whether the prompt asks for something that a safe policy refuses."""
        return "unsafe" in self.tags

    def to_json(self) -> Json:
        """Return the JSON-lines form; default values are omitted."""
        raw: Json = {"prompt": _messages_to_json(self.messages)}
        if self.tags:
            raw["tags"] = list(self.tags)
        if self.reference is not None:
            raw["reference"] = self.reference
        if self.id:
            raw["id"] = self.id
        if self.cluster:
            raw["cluster"] = self.cluster
        return raw

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Prompt":
        """Build a prompt from its JSON-lines form."""
        return cls(
            messages=messages_from_json(raw["prompt"]),
            tags=tuple(raw.get("tags") or ()),
            reference=raw.get("reference"),
            id=raw.get("id", ""),
            cluster=raw.get("cluster", ""),
        )


@dataclass(frozen=True, slots=True)
class Label:
    """One response marked as good or bad, without a partner, as used by KTO (2402.01306).

    `ended` is False if the response was truncated at a length limit.
    """

    name: ClassVar[RecordName] = "label"
    prompt: tuple[Message, ...]
    response: str
    desirable: bool
    ended: bool = True

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("a label needs a prompt")
        if not self.response.strip():
            raise ValueError("a label needs a response that is not empty")

    def to_json(self) -> Json:
        """Return the JSON-lines form; default values are omitted."""
        raw: Json = {"prompt": _messages_to_json(self.prompt), "response": self.response, "desirable": self.desirable}
        return raw | _ended_to_json(self.ended)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Label":
        """Build a label from its JSON-lines form."""
        return cls(
            prompt=messages_from_json(raw["prompt"]),
            response=raw["response"],
            desirable=bool(raw["desirable"]),
            ended=bool(raw.get("ended", True)),
        )


def cluster_key(record: "Prompt | Text | Demonstration") -> Hashable:
    """Return a value that equal or paraphrased records share.

    It is the cluster that the data name, else the prompt, or the text of a text record.
    """
    if isinstance(record, Prompt):
        return record.cluster or record.messages
    if isinstance(record, Text):
        return record.text
    prompt = record.messages[: next(i for i, turn in enumerate(record.messages) if turn.role == "assistant")]
    return record.cluster or prompt


def prompt_text(record: "Record") -> str:
    """Return the prompt of a record as one string: all turns before its (last) response; a text as a whole."""
    if isinstance(record, Text):
        return record.text
    if isinstance(record, Demonstration):
        last = max(i for i, message in enumerate(record.messages) if message.role == "assistant")
        return "\x1f".join(message.content for message in record.messages[:last])
    turns = record.messages if isinstance(record, Prompt) else record.prompt
    return "\x1f".join(message.content for message in turns)


def count_truncated(record: "Record") -> int:
    """Return the number of a record's responses that were truncated at a length limit."""
    if isinstance(record, Comparison):
        return 0 if record.ended is None else record.ended.count(False)
    return int(not getattr(record, "ended", True))


Record = Text | Demonstration | Comparison | Prompt | Label
RECORDS: dict[str, type[Record]] = {kind.name: kind for kind in (Text, Demonstration, Comparison, Prompt, Label)}
