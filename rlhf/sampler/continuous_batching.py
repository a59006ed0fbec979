"""Continuous batching: as soon as responses have ended, their slots take the next rows.

A prompt is computed once for all its rows, whenever they get their slots. A row's tokens depend on its prompt, its
noise and the weights, not on its slot or on the other rows.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.models.language_model import LanguageModel
from rlhf.models.module_state import evaluating
from rlhf.models.padding_free import decode, decodes_in_slots, hidden_states, lay_out
from rlhf.models.shared_prompt_cache import SharedPromptCache
from rlhf.models.slot_cache import PromptStates, SlotCache
from rlhf.sampler.rollout import positions

# Logits [S, V] and noise [S] -> tokens and log-probabilities, [S] each.
Draw = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
REFILL = 1 / 8  # share of slots that must be free before the next prompts are computed: a pass has a fixed cost
DROP = 1 / 4  # share of slots that must be free, and no row left for them, to drop them, which copies the cache


def can_decode_in_slots(policy: LanguageModel) -> bool:
    """Return whether the policy's architecture can; its first call compares two decode steps with a plain pass."""
    if policy.decodes_in_slots is None:
        with evaluating(policy):
            policy.decodes_in_slots = policy.padding_free and decodes_in_slots(policy.base.get_decoder(), policy.device)
    return policy.decodes_in_slots


@dataclass
class Prefilled:
    """Prompts whose keys and values are known; prompt i of the batch is number ``first + i``."""

    first: int
    states: PromptStates
    documents: Tensor  # [n, P] long, index of each token of a prompt
    lengths: Tensor  # [n] long
    hidden: Tensor  # [n, D], the state of the last token

    def __len__(self) -> int:
        return len(self.lengths)

    def last(self) -> "Prefilled":
        """Return the last prompt alone."""
        index = self.documents[-1, : int(self.lengths[-1])]
        states = PromptStates()
        states.layers = {number: (keys[index], values[index]) for number, (keys, values) in self.states.layers.items()}
        documents = torch.arange(len(index), device=index.device)[None]
        return Prefilled(self.first + len(self) - 1, states, documents, self.lengths[-1:], self.hidden[-1:])


class ContinuousBatch:
    """Rows of N prompts, each sampled ``samples`` times, decoded in a number of slots.

    Args:
        policy: The language model; its decoder must decode in slots.
        ids: Prompts, padded on the left, [N, P] long.
        mask: True on their tokens, [N, P] bool.
        noise: Uniform numbers in [0, 1), [N * samples, max_new_tokens].
        samples: Responses per prompt.
        slots: Rows decoded together.
        draw: Draws tokens given logits and noise.
    """

    def __init__(
        self, policy: LanguageModel, ids: Tensor, mask: Tensor, noise: Tensor, samples: int, slots: int, draw: Draw
    ) -> None:
        rows, self.longest = noise.shape
        self.policy, self.ids, self.mask, self.samples, self.draw = policy, ids, mask, samples, draw
        self.decoder = policy.base.get_decoder()
        self.prompt_lengths: list[int] = mask.sum(dim=1).tolist()
        self.pending = deque(range(rows))
        count, device = min(slots, rows), ids.device
        longest = max(self.prompt_lengths)
        self.cache = (
            SharedPromptCache(count, longest, self.longest, device)
            if samples > 1
            else SlotCache(count, longest + self.longest, device)
        )
        self.prefilled: Prefilled | None = None
        # One more column, for slots whose row has ended.
        self.noise = F.pad(noise, (0, 1))
        self.response = torch.full((rows, self.longest + 1), policy.end_id, device=device)
        self.logp = torch.zeros(rows, self.longest + 1, device=device)
        self.row = torch.zeros(count, dtype=torch.long, device=device)  # row of each slot
        self.sampled = torch.full((count,), self.longest, device=device)  # tokens that it has so far
        self.free = list(range(count))
        self.starts = [0] * count  # columns that each slot's row began with, less the decode steps before it began
        self.steps = 0
        # On a GPU the CPU waits for the result of a check; rows that have ended cost little until the next one.
        self.check_every = 1 if device.type == "cpu" else 8

    @torch.no_grad()
    def run(self) -> tuple[Tensor, Tensor]:
        """Return token ids and log-probabilities, [N * samples, max_new_tokens] each; end tokens after an end."""
        hidden = self._fill(None)
        while True:
            tokens = self._sample(self.policy.head(hidden))
            if self.steps % self.check_every == 0:
                ended = (self.sampled == self.longest).tolist()
                self.free = [slot for slot, is_free in enumerate(ended) if is_free]
            alive = len(ended) - len(self.free)
            if alive == 0 and not self.pending:
                return self.response[:, : self.longest], self.logp[:, : self.longest]
            if alive < (1 - DROP) * len(ended) and not self.pending:
                tokens, ended = self._drop(tokens), [False] * alive
            if alive:
                hidden = self._step(tokens)
            if self.pending and len(self.free) >= REFILL * len(ended):
                hidden = self._fill(hidden)

    def _sample(self, logits: Tensor) -> Tensor:
        """Draw a token for each slot and record it, [S, V] -> [S]."""
        tokens, logp = self.draw(logits, self.noise[self.row, self.sampled])
        self.response[self.row, self.sampled] = tokens
        self.logp[self.row, self.sampled] = logp
        goes_on = (tokens != self.policy.end_id) & (self.sampled + 1 < self.longest)
        self.sampled = torch.where(goes_on, self.sampled + 1, self.longest)
        return tokens

    def _step(self, tokens: Tensor) -> Tensor:
        """Feed each slot its token; return the states that the next tokens are drawn from, [S, D]."""
        free = set(self.free)
        longest = max(start for slot, start in enumerate(self.starts) if slot not in free)
        self.steps += 1
        return decode(self.decoder, tokens, self.cache, longest + self.steps)

    def _drop(self, tokens: Tensor) -> Tensor:
        """Drop the free slots; return the tokens of the others."""
        free = set(self.free)
        kept = [slot for slot in range(len(self.starts)) if slot not in free]
        index = torch.tensor(kept, device=tokens.device)
        self.cache.select(index)
        self.row, self.sampled = self.row[index], self.sampled[index]
        self.starts, self.free = [self.starts[slot] for slot in kept], []
        return tokens[index]

    def _fill(self, hidden: Tensor | None) -> Tensor:
        """Give the free slots the next rows; return the states of all slots, in which theirs are the prompts'."""
        slots = self.free[: len(self.pending)]
        rows = [self.pending.popleft() for _ in slots]
        self.free = self.free[len(slots) :]
        for source, taken in self._sources(rows):
            chosen = [slots[i] for i in taken]
            prompts = [rows[i] // self.samples for i in taken]
            where = torch.tensor(chosen, device=self.ids.device)
            index = torch.tensor([prompt - source.first for prompt in prompts], device=self.ids.device)
            self.cache.fill(where, source.states, source.documents[index], source.lengths[index], prompts)
            self.row[where] = torch.tensor([rows[i] for i in taken], device=self.ids.device)
            self.sampled[where] = 0
            for slot, prompt in zip(chosen, prompts, strict=True):
                self.starts[slot] = (0 if self.samples > 1 else self.prompt_lengths[prompt]) - self.steps
            if hidden is None:
                hidden = source.hidden.new_zeros(len(self.row), source.hidden.shape[-1])
            hidden[where] = source.hidden[index]
        assert hidden is not None
        return hidden

    def _sources(self, rows: list[int]) -> list[tuple[Prefilled, list[int]]]:
        """Return the prefilled prompts of rows, each with the indices of the rows that it serves."""
        sources = []
        known = self.prefilled
        first, last = rows[0] // self.samples, rows[-1] // self.samples
        if known is not None and known.first == first:
            sources.append((known, [i for i, row in enumerate(rows) if row // self.samples == first]))
            first += 1
        if first <= last:
            known = self._prefill(first, last + 1)
            sources.append((known, [i for i, row in enumerate(rows) if row // self.samples >= first]))
        is_complete = not self.pending or self.pending[0] // self.samples > last
        # What the prompt's other rows will need; a copy, so that the states of the other prompts are freed.
        self.prefilled = None if is_complete or known is None else known.last()
        return sources

    def _prefill(self, start: int, stop: int) -> Prefilled:
        """Compute prompts number ``start`` to ``stop - 1``."""
        mask = self.mask[start:stop]
        layout, states = lay_out(self.ids[start:stop], mask, positions(mask)), PromptStates()
        hidden = hidden_states(self.decoder, layout, states)
        last = layout.documents.gather(1, layout.lengths[:, None] - 1)[:, 0]
        return Prefilled(start, states, layout.documents, layout.lengths, hidden[last])
