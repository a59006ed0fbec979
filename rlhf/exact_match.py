"""A verifiable reward: is the answer in the reply the prompt's reference?"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf.answers import last_number, same
from rlhf.data.records import Prompt
from rlhf.errors import UserError
from rlhf.rollout import Rollout

_MARKER = "####"

Extract = Literal["last_number", "after_marker", "regex", "whole"]


@dataclass(frozen=True)
class ExactMatch:
    """1 where the answer extracted from the reply equals the prompt's reference, else 0.

    Args:
        extract: Where the answer is in the reply: "last_number"; "after_marker" is the rest of the line after the last
            `####` (GSM8K); "regex" is the first group of the last match of ``pattern``; "whole" is the reply.
        pattern: Regular expression with one group, for extract=regex.
        numbers: Whether answers are compared as numbers and mathematics (1,000 equals 1e3, 50% equals 50 and 0.5, a
            unit does not count); other text as text, without regard to case and spaces.
        correct: Score of the right answer.
        wrong: Score of another answer.
        missing: Score of a reply with no answer in it.
    """

    extract: Extract = "last_number"
    pattern: str | None = None
    numbers: bool = True
    correct: float = 1.0
    wrong: float = 0.0
    missing: float = 0.0

    def __post_init__(self) -> None:
        if (self.pattern is not None) != (self.extract == "regex"):
            raise UserError(
                f"reward.extract={self.extract} with reward.pattern={self.pattern}: a pattern is for extract=regex "
                "alone; type reward.extract=regex 'reward.pattern=\"answer: (.*)\"'"
            )
        try:
            groups = re.compile(self.pattern or "()").groups
        except re.error as error:
            raise UserError(f"reward.pattern={self.pattern}: no regular expression ({error})") from error
        if groups != 1:
            raise UserError(f"reward.pattern={self.pattern}: needs one group (in parentheses), has {groups}")
        if not self.correct > max(self.wrong, self.missing):
            raise UserError(
                f"reward.correct={self.correct} must be above reward.wrong={self.wrong} and "
                f"reward.missing={self.missing}"
            )

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError unless every prompt has a reference answer; called before anything is sampled."""
        without = [prompt for prompt in prompts if prompt.reference is None]
        if without:
            raise UserError(
                f"reward=exact_match: {len(without)} of {len(prompts)} prompts have no reference answer, such as "
                f"'{without[0].messages[-1].content[:60]}'; type data=arithmetic, data=gsm8k, or prompts with a "
                '"reference" field'
            )

    def answer(self, reply: str) -> str | None:
        """What a reply gives as its answer, None where it gives none."""
        if self.extract == "last_number":
            return last_number(reply)
        if self.extract == "after_marker":
            head, marker, rest = reply.rpartition(_MARKER)
            return rest.strip().split("\n")[0].strip() or None if marker else None
        if self.extract == "regex":
            found = [match[1] for match in re.finditer(self.pattern or "()", reply)]
            return (found[-1] or None) if found else None
        return reply.strip() or None

    def equal(self, answer: str, reference: str) -> bool:
        """Whether two answers are the same."""
        return same(answer, reference, self.numbers)

    def score(self, prompt: Prompt, reply: str) -> float:
        """The score of one reply."""
        answer = self.answer(reply)
        if answer is None:
            return self.missing
        if prompt.reference is None:
            self.check([prompt])
        return self.correct if self.equal(answer, str(prompt.reference)) else self.wrong

    def __call__(self, rollout: Rollout) -> Tensor:
        """Scores, [B]. Of a reply with tool calls the last turn is read."""
        pairs = zip(rollout.prompts, rollout.texts, strict=True)
        scores = [self.score(prompt, text) for prompt, text in pairs]
        return torch.tensor(scores, dtype=torch.float32, device=rollout.mask.device)
