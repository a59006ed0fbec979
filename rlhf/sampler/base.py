"""Sampler interface: takes prompts, returns a Rollout of K responses to each."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Annotated, TypeVar

from pydantic import Field

from rlhf.data.encoding import encode_prompt
from rlhf.data.records import Prompt
from rlhf.errors import UserError, key
from rlhf.models.language_model import LanguageModel
from rlhf.sampler.rollout import Rollout

__all__ = ["Sampler", "single"]


class Sampler(ABC):
    """Base class of samplers. A sampler defines ``sample``; every other member has a default.

    A constructor only keeps its hyperparameters, because plans build samplers to check them; models and files are
    opened by ``sample``.

    Args:
        max_new_tokens: Longest response, in tokens, end-of-turn included.
        temperature: Divides the logits; 0 takes the most likely token. Stages score the policy at this temperature.
        samples: Responses per prompt (K).
        batch_size: Rows sampled at a time; bounds the cache's memory.
    """

    def __init__(
        self,
        max_new_tokens: Annotated[int, Field(gt=0)] = 32,
        temperature: Annotated[float, Field(ge=0)] = 1.0,
        samples: Annotated[int, Field(gt=0)] = 1,
        batch_size: Annotated[int, Field(gt=0)] = 512,
    ) -> None:
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.samples = samples
        self.batch_size = batch_size

    @abstractmethod
    def sample(self, policy: LanguageModel, prompts: list[Prompt], seed: int) -> Rollout:
        """Sample K responses to each of N prompts: a Rollout of B = N * K rows, deterministic by ``seed``.

        The rows of a prompt are consecutive. ``logp`` is that of the sampling distribution.

        Raises:
            UserError: For a prompt that is too long for the context (``check`` raises it).
        """

    @property
    def exact(self) -> bool:
        """Return whether the sampling distribution is the model's own at this temperature; by default if it is above 0.

        Override it in a sampler that draws from another distribution: stages that score the policy then refuse it.
        """
        return self.temperature > 0

    @property
    def matches_policy(self) -> bool:
        """Return whether responses are sampled with the policy's own weights, in its own precision; True by default.

        Override it in a sampler with weights or arithmetic of its own (a 16-bit copy, a quantised model, an engine in
        another process). Stages then compute the policy's log-probabilities beside the sampler's, log the difference,
        and can correct it (``objective.sampler_correction``).
        """
        return True

    @property
    def longest(self) -> int:
        """Upper bound of the policy's own tokens in a response; ``max_new_tokens`` by default."""
        return self.max_new_tokens

    @property
    def spread(self) -> list[float]:
        """Temperatures of a prompt's K responses, in their order; all of them ``temperature`` by default."""
        return [self.temperature] * self.samples

    def require_single_turn(self, why: str) -> None:  # noqa: B027
        """Raise UserError for a sampler whose responses have several turns; by default it never raises.

        ``why`` is the reason in the message of samplers that raise: a clause such as "comparisons are of single
        responses".
        """

    def room(self, policy: LanguageModel) -> int:
        """Return the most tokens that may follow a prompt, the policy's own or not; ``longest`` by default."""
        return self.longest

    def check(self, policy: LanguageModel, prompts: list[Prompt]) -> list[list[int]]:
        """Return the tokens of the prompts.

        Raises:
            UserError: For a prompt that leaves less than ``room`` of the context.
        """
        encoded = [encode_prompt(policy.tokenizer, prompt.messages) for prompt in prompts]
        self.check_lengths(policy, prompts, [len(ids) for ids in encoded])
        return encoded

    def check_lengths(self, policy: LanguageModel, prompts: Sequence[Prompt], lengths: Sequence[int]) -> None:
        """Check prompts as ``check`` does, given their lengths in tokens."""
        self.check_context(policy.context_length, self.room(policy))
        limit = policy.context_length - self.room(policy)
        for prompt, length in zip(prompts, lengths, strict=True):
            if length > limit:
                raise UserError(
                    f"the prompt '{prompt.messages[-1].content[:60]}' has {length} tokens, and the model's context of "
                    f"{policy.context_length} leaves {limit} for a prompt",
                    fix=f"type {key('data.max_prompt_length', limit)} or a smaller {key('sampler.max_new_tokens')}",
                    option="sampler.max_new_tokens",
                    value=self.max_new_tokens,
                )

    def check_context(self, context: int, room: int | None = None) -> None:
        """Check that the longest response leaves room for a prompt in the context.

        Args:
            context: Context length of the policy, in tokens.
            room: Result of ``room``; the default is the response's own tokens, which are known without a policy.

        Raises:
            UserError: If the longest response alone fills the context, whatever the prompts are.
        """
        room = self.longest if room is None else room
        if room >= context:
            values = self.reducible_hyperparameters(context)
            fixes = [key(f"sampler.{name}", value) for name, value in values.items() if value is not None]
            others = [key(f"sampler.{name}") for name, value in values.items() if value is None]
            fixes += [f"a smaller {' or '.join(others)}"] if others else []
            raise UserError(
                f"leaves no room for a prompt: a response has up to {room} tokens, the model's context has {context}",
                fix=f"type {' or '.join(fixes)}",
                option="sampler.max_new_tokens",
                value=self.max_new_tokens,
            )

    def reducible_hyperparameters(self, context: int) -> Mapping[str, int | None]:
        """Return the hyperparameters that shorten the longest response, each with a value that leaves room.

        The value is None where it depends on the others. ``check_context`` names them in its error.
        """
        return {"max_new_tokens": max(1, context // 2)}


S = TypeVar("S", bound=Sampler)


def single(sampler: S) -> S:
    """Return a copy of the sampler that generates one response per prompt."""
    one = copy(sampler)
    one.samples = 1
    return one
