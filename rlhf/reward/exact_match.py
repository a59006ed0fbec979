"""Exact-match reward: verifies that the response's answer equals the prompt's reference."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf.data.records import Prompt
from rlhf.errors import UserError, key
from rlhf.reward.answers import last_number, same
from rlhf.reward.base import Reward
from rlhf.sampler.rollout import Rollout

_MARKER = "####"
_EXAMPLE = '"answer: (.*)"'  # of a pattern, for messages

Extract = Literal["last_number", "after_marker", "regex", "whole"]


@dataclass(frozen=True)
class ExactMatch(Reward):
    """Exact-match reward: ``correct`` where the extracted answer equals the prompt's reference.

    Args:
        extract: Location of the answer in the response: "last_number"; "after_marker" is the rest of the line after the
            last `####` (GSM8K); "regex" is the first group of the last match of ``pattern``; "whole" is the response.
        pattern: Regular expression with one group, for extract=regex.
        numbers: Whether answers are compared as numbers and mathematics (1,000 equals 1e3, 50% equals 50 and 0.5, a
            unit is ignored); other answers are compared as text, without regard to case and spaces.
        correct: Score of the correct answer.
        wrong: Score of another answer.
        missing: Score of a response without an answer.
    """

    extract: Extract = "last_number"
    pattern: str | None = None
    numbers: bool = True
    correct: float = 1.0
    wrong: float = 0.0
    missing: float = 0.0

    def __post_init__(self) -> None:
        example = f"'{key('reward.pattern', _EXAMPLE)}'"
        if self.extract == "regex" and self.pattern is None:
            raise UserError(
                f"needs {key('reward.pattern')}",
                fix=f"type for example {example}",
                option="reward.extract",
                value=self.extract,
            )
        if self.extract != "regex" and self.pattern is not None:
            raise UserError(
                f"is read only with {key('reward.extract', 'regex')}, not with {key('reward.extract', self.extract)}",
                fix=f"type {key('reward.extract', 'regex')} or {key('reward.pattern', None)}",
                option="reward.pattern",
                value=self.pattern,
            )
        try:
            groups = re.compile(self.pattern or "()").groups
        except re.error as error:
            raise UserError(
                f"is not a regular expression ({error})",
                fix=f"type for example {example}",
                option="reward.pattern",
                value=self.pattern,
            ) from error
        if groups != 1:
            raise UserError(
                f"must have one group (in parentheses), has {groups}",
                fix=f"type for example {example}",
                option="reward.pattern",
                value=self.pattern,
            )
        if not self.correct > max(self.wrong, self.missing):
            raise UserError(
                f"must be greater than {key('reward.wrong', self.wrong)} and {key('reward.missing', self.missing)}",
                fix=f"type for example {key('reward.correct', max(self.wrong, self.missing) + 1)}",
                option="reward.correct",
                value=self.correct,
            )

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Check, before anything is sampled, that every prompt has a reference answer.

        Raises:
            UserError: For prompts without a reference answer.
        """
        without = [prompt for prompt in prompts if prompt.reference is None]
        if without:
            raise UserError(
                f"{len(without)} of {len(prompts)} prompts have no reference answer, for example "
                f"'{without[0].messages[-1].content[:60]}'",
                fix=f"type {key('data', 'arithmetic')}, {key('data', 'gsm8k')}, or the path of prompts with a "
                '"reference" field',
                option="reward",
                value="exact_match",
            )

    def answer(self, response: str) -> str | None:
        """Extract the answer of a response; return None where it has none."""
        if self.extract == "last_number":
            return last_number(response)
        if self.extract == "after_marker":
            head, marker, rest = response.rpartition(_MARKER)
            return rest.strip().split("\n")[0].strip() or None if marker else None
        if self.extract == "regex":
            found = [match[1] for match in re.finditer(self.pattern or "()", response)]
            return (found[-1] or None) if found else None
        return response.strip() or None

    def equal(self, answer: str, reference: str) -> bool:
        """Return whether two answers are equal."""
        return same(answer, reference, self.numbers)

    def score(self, prompt: Prompt, response: str) -> float:
        """Return the score of one response."""
        answer = self.answer(response)
        if answer is None:
            return self.missing
        if prompt.reference is None:
            self.check([prompt])
        return self.correct if self.equal(answer, str(prompt.reference)) else self.wrong

    def __call__(self, rollout: Rollout) -> Tensor:
        """Return the scores, [B]. Of a response with tool calls only the last turn is read."""
        pairs = zip(rollout.prompts, rollout.texts, strict=True)
        scores = [self.score(prompt, text) for prompt, text in pairs]
        return torch.tensor(scores, dtype=torch.float32, device=rollout.mask.device)
