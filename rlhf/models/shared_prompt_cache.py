"""Slots whose rows share prompts: the keys and values of a prompt are kept once, and read once for all its rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.models.slot_cache import PromptStates, SlotCache, layer_number


class SharedPromptCache(SlotCache):
    """Keys and values of S slots that hold responses, [S, H, R, d], and of M prompts, [M, H, P, d], for each layer.

    A decode step multiplies the queries of all rows of a prompt with its keys together.

    Args:
        slots: Number of rows that are decoded together.
        prompt_columns: Tokens of the longest prompt (P).
        columns: Most tokens of a response that are read (R).
        device: Device of the states.
    """

    def __init__(self, slots: int, prompt_columns: int, columns: int, device: torch.device) -> None:
        super().__init__(slots, prompt_columns + columns, device)
        self.prompt_columns, self.own_columns = prompt_columns, columns
        self.prompt_lengths = torch.zeros_like(self.lengths)
        self._prompt_of: list[int] = [-1] * slots  # number of each slot's prompt
        self._places: dict[int, int] = {}  # prompt -> its index in the buffers
        self._prompts: dict[int, list[Tensor]] = {}  # layer -> keys and values of the prompts
        # The slots of each prompt, [M, most of them], filled up with any slot; and where each slot is in that table.
        self._members = self._where = self.lengths

    def fill(
        self, slots: Tensor, states: PromptStates, documents: Tensor, lengths: Tensor, prompts: Sequence[int] = ()
    ) -> None:
        """Replace what slots hold by prompts; ``prompts`` are their numbers, [n]."""
        for slot, prompt in zip(slots.tolist(), prompts, strict=True):
            self._prompt_of[slot] = prompt
        used = set(self._prompt_of)
        self._places = {prompt: place for prompt, place in self._places.items() if prompt in used}
        new = {prompt: row for row, prompt in enumerate(prompts) if prompt not in self._places}
        taken = set(self._places.values())
        vacant = [place for place in range(len(taken) + len(new)) if place not in taken][: len(new)]
        self._places.update(zip(new, vacant, strict=True))
        rows = documents[list(new.values())]
        for number, recorded in states.layers.items():
            if number not in self._layers:
                keys, values = (
                    states.new_zeros(len(self.lengths), states.shape[1], self.own_columns, states.shape[2])
                    for states in recorded
                )
                self._layers[number] = keys, values
                self._prompts[number] = [
                    values.new_zeros(0, values.shape[1], self.prompt_columns, values.shape[2]) for values in recorded
                ]
            buffers = self._prompts[number]
            for index, values in enumerate(recorded):
                missing = max(self._places.values()) + 1 - len(buffers[index])
                if missing > 0:
                    buffers[index] = torch.cat(
                        [buffers[index], buffers[index].new_zeros(missing, *buffers[index].shape[1:])]
                    )
                buffers[index][vacant, :, : documents.shape[1]] = values[rows].transpose(1, 2)
        self.lengths[slots] = lengths
        self.prompt_lengths[slots] = lengths
        self._group()

    def select(self, slots: Tensor) -> None:
        """Keep only the slots of these numbers, [n] long, in that order."""
        super().select(slots)
        self.prompt_lengths = self.prompt_lengths[slots]
        self._prompt_of = [self._prompt_of[slot] for slot in slots.tolist()]
        kept = sorted({self._places[prompt] for prompt in self._prompt_of})
        if len(kept) < len(self._places):
            self._prompts = {number: [states[kept] for states in both] for number, both in self._prompts.items()}
            self._places = {p: kept.index(place) for p, place in self._places.items() if place in kept}
        self._group()

    def _group(self) -> None:
        """Compute the table of the slots of each prompt."""
        count = max(self._places.values()) + 1
        groups: list[list[int]] = [[] for _ in range(count)]
        for slot, prompt in enumerate(self._prompt_of):
            if prompt >= 0:
                groups[self._places[prompt]].append(slot)
        most = max(len(group) for group in groups)
        where = [0] * len(self._prompt_of)
        for place, group in enumerate(groups):
            for index, slot in enumerate(group):
                where[slot] = place * most + index
        device = self.lengths.device
        self._members = torch.tensor([group + [0] * (most - len(group)) for group in groups], device=device)
        self._where = torch.tensor(where, device=device)

    def start_step(self, width: int) -> None:
        """Prepare a decode step, in which each slot gets one more token.

        Args:
            width: Tokens of the longest response, the new one included.
        """
        self.width = min(width, self.own_columns)
        self.lengths.clamp_(max=self.prompt_lengths + (self.own_columns - 1))
        self._places_by_heads: dict[int, Tensor] = {}
        self._masks = {}

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Write the states of each slot's new token, and return its attention output, [S, 1, H, d]."""
        rows, heads, _, width = query.shape
        groups = key.shape[1]
        number = layer_number(module)
        place = self._place_of(groups)
        own = []
        for buffer, new in zip(self._layers[number], (key, value), strict=True):
            buffer.view(-1, new.shape[-1]).index_copy_(0, place, new.reshape(-1, new.shape[-1]))
            own.append(buffer.view(rows * groups, self.own_columns, -1)[:, : self.width])
        prompts = [states[: len(self._members)].flatten(0, 1) for states in self._prompts[number]]
        shape = *self._members.shape, groups, heads // groups
        query = query.view(rows, groups, heads // groups, width)

        def by_prompt(values: Tensor) -> Tensor:  # [S, groups, G, n] -> [M * groups, most * G, n]
            return values[self._members].transpose(1, 2).reshape(shape[0] * groups, -1, values.shape[-1])

        def by_slot(values: Tensor) -> Tensor:  # the inverse
            table = values.view(shape[0], groups, shape[1], shape[3], values.shape[-1]).transpose(1, 2)
            return table.reshape(-1, groups, shape[3], values.shape[-1])[self._where]

        scores = torch.cat(
            [
                by_slot(torch.bmm(by_prompt(query), prompts[0].transpose(1, 2))),
                torch.bmm(query.flatten(0, 1), own[0].transpose(1, 2)).view(*query.shape[:3], -1),
            ],
            dim=-1,
        )
        scale = options.get("scaling") or width**-0.5
        scores = scores.float() * scale + self._mask(options.get("sliding_window"), torch.float32)
        weights = scores.softmax(dim=-1).to(query.dtype)
        to_prompt, to_own = weights.split([self.prompt_columns, self.width], dim=-1)
        output = by_slot(torch.bmm(by_prompt(to_prompt), prompts[1]))
        output = output + torch.bmm(to_own.reshape(rows * groups, -1, self.width), own[1]).view(output.shape)
        return output.reshape(rows, 1, heads, -1)

    def _place_of(self, groups: int) -> Tensor:
        """Return where the new states are written, as an index into [S * groups * R]."""
        if groups not in self._places_by_heads:
            first = torch.arange(len(self.lengths) * groups, device=self.lengths.device) * self.own_columns
            column = self.lengths - self.prompt_lengths
            self._places_by_heads[groups] = first + column.repeat_interleave(groups)
        return self._places_by_heads[groups]

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return what is added to the attention scores, [S, 1, 1, P + width]: 0 on a row's own tokens, else -inf."""
        if window is not None and window >= self.columns:
            window = None
        if window not in self._masks:
            device = self.lengths.device
            prompt = torch.arange(self.prompt_columns, device=device).expand(len(self.lengths), -1)
            absent = prompt >= self.prompt_lengths[:, None]
            own = self.prompt_lengths[:, None] + torch.arange(self.width, device=device)
            distance = self.lengths[:, None] - torch.cat([prompt, own], dim=1)
            hidden = torch.cat([absent, torch.zeros_like(own, dtype=torch.bool)], dim=1) | (distance < 0)
            if window is not None:
                hidden |= distance >= window
            mask = torch.zeros(distance.shape, dtype=dtype, device=device)
            self._masks[window] = mask.masked_fill_(hidden, -torch.inf)[:, None, None]
        return self._masks[window]
