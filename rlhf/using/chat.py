"""A dialogue with a policy: turns, the model's chat template, and what is left of its context."""

from collections.abc import Iterator, Sequence

from jinja2 import TemplateError

from rlhf.data.records import Message
from rlhf.data.template import encode_prompt
from rlhf.errors import UserError
from rlhf.models.language_model import LanguageModel
from rlhf.rollout import Sampler
from rlhf.using.generation import stream
from rlhf.using.templates import as_typed


class ContextFull(UserError):
    """The dialogue leaves no room for a reply."""


class Chat:
    """The turns so far, and replies to new ones.

    Nothing is ever left out of what the model sees: a dialogue that no longer fits is refused.

    Args:
        policy: The language model.
        sampler: How replies are sampled; ``max_new_tokens`` is the longest reply.
        system: What the system message says; None: none (a template may have one of its own).
        seed: Of the sampling; the n-th reply has the same random numbers in every chat with this seed.
        given: Whether the chat template is one that was typed; else it is the model's own.
    """

    def __init__(
        self, policy: LanguageModel, sampler: Sampler, system: str | None = None, seed: int = 0, given: bool = False
    ) -> None:
        self.given = given
        self.policy, self.sampler, self.system, self.seed = policy, sampler, system, seed
        self.turns: list[Message] = []
        self.cut = ""  # why the last reply did not come to its end; empty if it did
        self.used = 0  # tokens of the context that the dialogue takes
        self._replies = 0

    @property
    def messages(self) -> list[Message]:
        """The dialogue with its system message."""
        return [*([Message("system", self.system)] if self.system else []), *self.turns]

    def reset(self, system: str | None = None) -> None:
        """Forgets all turns; ``system``, where given, is the new system message ("" for none)."""
        self.turns = []
        self.used = 0
        if system is not None:
            self.system = system or None

    def say(self, text: str) -> Iterator[str]:
        """What the policy replies, piece by piece; the turns are kept once the reply is complete.

        Raises:
            ContextFull: With this turn there is no room for a reply. The turn is not kept.
            UserError: The template refuses the dialogue.
        """
        asked = [*self.messages, Message("user", text)]
        ids = self.encoded(asked)
        left = self.policy.context_length - len(ids)
        if left < 1:
            raise ContextFull(
                f"the context is full: with this turn the dialogue has {len(ids)} tokens and the model reads "
                f"{self.policy.context_length}; type /reset to start over"
            )
        knobs = self.sampler
        sampler = Sampler(min(knobs.max_new_tokens, left), knobs.temperature, knobs.top_k, knobs.top_p)
        seed, self._replies = self.seed * 1_000_003 + self._replies, self._replies + 1
        reply: list[int] = []
        shown = ""
        ended = False
        for token in stream(self.policy, ids, sampler, seed):
            reply.append(token)
            ended = token == self.policy.end_id
            whole = self._text(reply)
            # A character of several tokens is not shown before it is whole.
            if not whole.endswith("\ufffd") and whole.startswith(shown) and len(whole) > len(shown):
                yield whole[len(shown) :]
                shown = whole
        whole = self._text(reply)
        if whole.startswith(shown) and len(whole) > len(shown):
            yield whole[len(shown) :]
        self.cut = "" if ended else self._reason(len(reply), left)
        self.used = len(ids) + len(reply)
        self.turns += [Message("user", text), Message("assistant", whole.strip())]

    def encoded(self, messages: Sequence[Message]) -> list[int]:
        """A dialogue in tokens. Raises UserError where the template refuses it, such as for a system message."""
        try:
            with as_typed(self.given):
                return encode_prompt(self.policy.tokenizer, messages)
        except TemplateError as error:
            raise UserError(f"the model's chat template refuses this dialogue: {error}") from error

    def _text(self, reply: list[int]) -> str:
        return str(self.policy.tokenizer.decode(reply, skip_special_tokens=True)).lstrip()

    def _reason(self, length: int, left: int) -> str:
        if length >= left:
            return f"cut: the model's context of {self.policy.context_length} tokens is full; /reset starts over"
        return f"cut after {length} tokens; --max-new-tokens allows more"
