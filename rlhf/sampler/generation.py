"""Generation of responses to given prompts: in batches for files and measurements, or token by token for chat."""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rlhf.data.records import Prompt
from rlhf.errors import UserError
from rlhf.models.language_model import LanguageModel
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.rollout import Rollout, positions


class SeededSampler(AncestralSampler):
    """Sampler whose random numbers depend on the prompt's index and the seed, not on its place in a batch.

    Responses are therefore the same for every batch size, and the remaining ones are the same after an interruption.
    """

    def sample_some(self, policy: LanguageModel, prompts: Sequence[Prompt], first: int, seed: int) -> Rollout:
        """Sample responses to prompts number ``first`` and following.

        The rows equal those that sampling all prompts together would give.
        """
        self._first = first
        return self.sample(policy, list(prompts), seed)

    @property
    def prompts_at_once(self) -> int:
        """Prompts per batch."""
        return max(1, self.batch_size // self.samples)

    def _noise(self, rows: int, columns: int, seed: int) -> Tensor:
        numbers = range(self._first, self._first + rows // self.samples)
        return torch.cat([self._of_prompt(number, columns, seed) for number in numbers])

    def _of_prompt(self, number: int, columns: int, seed: int) -> Tensor:
        name = hashlib.sha256(f"generate/{seed}/{number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(name[:8], "big") >> 1)
        return torch.rand(self.samples, columns, generator=generator)


def generate_batches(
    policy: LanguageModel, prompts: Sequence[Prompt], sampler: SeededSampler, seed: int, start: int = 0
) -> Iterator[Rollout]:
    """Yield rollouts of one batch of prompts each, from prompt number ``start`` on.

    The tokens do not depend on ``start``. The last digits of log-probabilities do, because of padding, unless a batch
    begins at ``start``.
    """
    size = sampler.prompts_at_once
    for first in range(start, len(prompts), size):
        yield sampler.sample_some(policy, prompts[first : first + size], first, seed)


def room(policy: LanguageModel, prompts: Sequence[Prompt], wanted: int | None, default: int = 128) -> int:
    """Return the longest response, in tokens: ``wanted``, else ``default`` or what the longest prompt leaves.

    Raises:
        UserError: If a prompt leaves less of the context than wanted, or nothing.
    """
    from rlhf.data.encoding import encode_prompt

    lengths = [len(encode_prompt(policy.tokenizer, prompt.messages)) for prompt in prompts]
    longest = max(range(len(prompts)), key=lengths.__getitem__)
    left = policy.context_length - lengths[longest]
    if left < (wanted or 1):
        raise UserError(
            f"prompt number {longest + 1} ('{prompts[longest].messages[-1].content[:60]}') has {lengths[longest]} "
            f"tokens and leaves {max(0, left)} of the model's context of {policy.context_length} for a response",
            fix=f"type --max-new-tokens {left}, or shorten the prompt" if left > 0 else "shorten the prompt",
        )
    return wanted or min(default, left)


@torch.no_grad()
def stream(policy: LanguageModel, ids: Sequence[int], sampler: AncestralSampler, seed: int) -> Iterator[int]:
    """Yield the tokens of one response as they are sampled, end-of-turn included.

    With temperature 0 they equal those of `AncestralSampler`.

    Args:
        policy: The language model.
        ids: Tokens of the prompt with its generation prompt.
        sampler: Provides the sampling distribution and the maximum length.
        seed: Seed of the sampling.
    """
    device = policy.device
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(1, len(ids), dtype=torch.bool, device=device)
    hidden, cache = policy.step(torch.tensor([list(ids)], device=device), mask, positions(mask))
    for number in range(sampler.max_new_tokens):
        uniform = torch.rand(1, generator=generator).to(device)
        token, _ = sampler._draw(policy.head(hidden[:, -1]), uniform)
        index = int(token)
        yield index
        if index == policy.end_id or number + 1 == sampler.max_new_tokens:
            return
        mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
        place = torch.tensor([[len(ids) + number]], device=device)
        hidden, cache = policy.step(token[:, None], mask, place, cache)
