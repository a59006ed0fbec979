"""Dialogue with a policy: turns, the model's chat template, and the remaining context."""

from collections.abc import Iterator, Sequence

from jinja2 import TemplateError

from rlhf.data.encoding import encode_prompt
from rlhf.data.records import Message
from rlhf.errors import UserError
from rlhf.models.language_model import LanguageModel
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.generation import stream
from rlhf.using.templates import as_typed


class ContextFull(UserError):
    """Error: the dialogue leaves no tokens of the context for a response."""


class Chat:
    """Dialogue with a policy, which generates a response to each new user turn.

    The model always reads the whole dialogue: one that no longer fits raises instead of being truncated.

    Args:
        policy: The language model.
        sampler: Sampling settings; ``max_new_tokens`` is the maximum length of a response.
        system: Content of the system message; None: none (a template may have its own default).
        seed: Seed of sampling; the n-th response has the same random numbers in every chat with this seed.
        given: Whether the chat template comes from the command line; else it is the model's own.
    """

    def __init__(
        self,
        policy: LanguageModel,
        sampler: AncestralSampler,
        system: str | None = None,
        seed: int = 0,
        given: bool = False,
    ) -> None:
        self.given = given
        self.policy, self.sampler, self.system, self.seed = policy, sampler, system, seed
        self.turns: list[Message] = []
        self.cut = ""  # why the last response was cut off; empty if it ended
        self.used = 0  # tokens of the context that the dialogue uses
        self._responses = 0

    @property
    def messages(self) -> list[Message]:
        """Return the dialogue with its system message."""
        return [*([Message("system", self.system)] if self.system else []), *self.turns]

    def reset(self, system: str | None = None) -> None:
        """Delete all turns; if ``system`` is not None, it becomes the new system message ("" for none)."""
        self.turns = []
        self.used = 0
        if system is not None:
            self.system = system or None

    def respond(self, text: str) -> Iterator[str]:
        """Yield the policy's response in pieces; store both turns once the response is complete.

        Raises:
            ContextFull: With this turn no tokens are left for a response. The turn is not stored.
            UserError: The template rejects the dialogue.
        """
        dialogue = [*self.messages, Message("user", text)]
        ids = self.encoded(dialogue)
        left = self.policy.context_length - len(ids)
        if left < 1:
            raise ContextFull(
                f"the context is full: with this turn the dialogue has {len(ids)} tokens, and the model reads "
                f"{self.policy.context_length}",
                fix="type /reset to clear the dialogue",
            )
        hyperparameters = self.sampler
        sampler = AncestralSampler(
            min(hyperparameters.max_new_tokens, left),
            hyperparameters.temperature,
            hyperparameters.top_k,
            hyperparameters.top_p,
        )
        seed, self._responses = self.seed * 1_000_003 + self._responses, self._responses + 1
        response: list[int] = []
        shown = ""
        ended = False
        for token in stream(self.policy, ids, sampler, seed):
            response.append(token)
            ended = token == self.policy.end_id
            whole = self._text(response)
            # A character that consists of several tokens is held back until it is complete.
            if not whole.endswith("\ufffd") and whole.startswith(shown) and len(whole) > len(shown):
                yield whole[len(shown) :]
                shown = whole
        whole = self._text(response)
        if whole.startswith(shown) and len(whole) > len(shown):
            yield whole[len(shown) :]
        self.cut = "" if ended else self._reason(len(response), left)
        self.used = len(ids) + len(response)
        self.turns += [Message("user", text), Message("assistant", whole.strip())]

    def encoded(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a dialogue.

        Raises:
            UserError: The template rejects the dialogue, for example because of a system message.
        """
        try:
            with as_typed(self.given):
                return encode_prompt(self.policy.tokenizer, messages)
        except TemplateError as error:
            raise UserError(f"the model's chat template rejects this dialogue: {error}") from error

    def _text(self, response: list[int]) -> str:
        return str(self.policy.tokenizer.decode(response, skip_special_tokens=True)).lstrip()

    def _reason(self, length: int, left: int) -> str:
        if length >= left:
            return f"cut: the context of {self.policy.context_length} tokens is full; type /reset to clear the dialogue"
        return f"cut after {length} tokens; a larger --max-new-tokens allows more"
