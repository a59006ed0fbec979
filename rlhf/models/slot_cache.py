"""Key-value cache with one slot per row: a decode step writes in place, and a slot may change its row at any time.

The tokens of a row are in the columns 0, 1, 2, ... of its slot, without padding, however long others are.
The cache is not transformers': attention writes to it and reads from it itself (``rlhf.models.padding_free.attend``),
so a decode step builds one mask and copies no earlier states.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PromptStates:
    """Keys and values of the distinct tokens of a batch of prompts, [N, H, d] for each layer."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def record(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        """Keep the states of a layer, [1, H, N, d] each."""
        self.layers[layer_number(module)] = key[0].transpose(0, 1), value[0].transpose(0, 1)


class SlotCache:
    """Keys and values of S slots with C columns each, [S, C, H, d] for each layer.

    Args:
        slots: Number of rows that are decoded together.
        columns: Most tokens of a row.
        device: Device of the states.
    """

    def __init__(self, slots: int, columns: int, device: torch.device) -> None:
        self.columns = columns
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)  # tokens in each slot
        self.width = 0  # columns that attention reads
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._place = self.lengths  # where each slot's next token is written, as an index into [S * C]
        self._masks: dict[int | None, Tensor] = {}  # by sliding window, of one decode step

    def fill(
        self, slots: Tensor, states: PromptStates, documents: Tensor, lengths: Tensor, prompts: Sequence[int] = ()
    ) -> None:
        """Replace what slots hold by prompts.

        Args:
            slots: Numbers of the slots, [n] long.
            states: States of the distinct tokens of a batch of prompts.
            documents: Index into those tokens for each slot, [n, P] long; anything after a prompt's end.
            lengths: Tokens of each prompt, [n] long.
            prompts: Numbers of the prompts, [n]; equal numbers are the same prompt. Not needed here.
        """
        for number, recorded in states.layers.items():
            if number not in self._layers:
                shape = len(self.lengths), self.columns, *recorded[0].shape[1:]
                # Zeros, because attention multiplies what a masked column holds by zero, and not-a-number would stay.
                self._layers[number] = (
                    recorded[0].new_zeros(shape),
                    recorded[1].new_zeros(*shape[:3], recorded[1].shape[-1]),
                )
            for buffer, values in zip(self._layers[number], recorded, strict=True):
                buffer[slots, : documents.shape[1]] = values[documents]
        self.lengths[slots] = lengths

    def select(self, slots: Tensor) -> None:
        """Keep only the slots of these numbers, [n] long, in that order."""
        self.lengths = self.lengths[slots]
        self._layers = {number: (keys[slots], values[slots]) for number, (keys, values) in self._layers.items()}

    def start_step(self, width: int) -> None:
        """Prepare a decode step, in which each slot gets one more token.

        Args:
            width: Columns that attention reads: at least the tokens of the longest row, the new one included.
        """
        self.width = min(width, self.columns)
        # A slot without a row is computed too, up to the last column.
        self.lengths.clamp_(max=self.columns - 1)
        first = torch.arange(len(self.lengths), device=self.lengths.device) * self.columns
        self._place = first + self.lengths
        self._masks = {}

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Write the states of each slot's new token, and return its attention output, [S, 1, H, d].

        Args:
            module: Attention layer.
            query: [S, H, 1, d].
            key: As ``query``, with the number of key-value heads.
            value: As ``key``.
            options: What transformers passes to an attention kernel.
        """
        rows, heads, _, width = query.shape
        groups = key.shape[1]
        states = []
        for buffer, new in zip(self._layers[layer_number(module)], (key, value), strict=True):
            buffer.view(-1, groups * new.shape[-1]).index_copy_(0, self._place, new.reshape(rows, -1))
            states.append(buffer[:, : self.width].transpose(1, 2))
        output = F.scaled_dot_product_attention(
            query.view(rows, groups, heads // groups, width),  # heads that share keys are queries of one head
            states[0],
            states[1],
            attn_mask=self._mask(options.get("sliding_window"), query.dtype),
            dropout_p=options.get("dropout") or 0.0,
            scale=options.get("scaling"),
        )
        return output.reshape(rows, 1, heads, output.shape[-1])

    def finish_step(self) -> None:
        """Count the new tokens."""
        self.lengths += 1

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return what is added to the attention scores, [S, 1, 1, width]: 0 on a row's own tokens, else -inf."""
        if window is not None and window >= self.width:
            window = None
        if window not in self._masks:
            distance = self.lengths[:, None] - torch.arange(self.width, device=self.lengths.device)
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            mask = torch.zeros(distance.shape, dtype=dtype, device=distance.device)
            self._masks[window] = mask.masked_fill_(hidden, -torch.inf)[:, None, None]
        return self._masks[window]


def layer_number(module: nn.Module) -> int:
    """Return the number of an attention layer in its model."""
    number: Any = module.layer_idx
    return int(number)
