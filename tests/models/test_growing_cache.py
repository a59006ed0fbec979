"""Decoding with a cache that grows in place equals decoding with transformers' own."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rlhf.models import growing_cache
from rlhf.models.growing_cache import GrowingLayer, grow
from tests.models.conftest import random_model


def states(rows: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, 2, tokens, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("room", [1, 3, 64])
def test_a_layer_holds_what_the_layer_of_transformers_holds(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing_cache, "ROOM", room)
    plain, ours = DynamicCache(), DynamicCache()
    for cache in (plain, ours):
        cache.update(states(2, 5, 0), states(2, 5, 1), 0)
    with torch.no_grad():
        grow(ours)
    assert type(ours.layers[0]) is GrowingLayer and type(plain.layers[0]) is DynamicLayer
    changes: dict[int, Any] = {
        0: lambda cache: cache.batch_repeat_interleave(3),
        4: lambda cache: cache.batch_select_indices(torch.tensor([0, 2, 5])),
    }
    rows = 2
    for number in range(9):
        if number in changes:
            for cache in (plain, ours):
                changes[number](cache)
            rows = 6 if number == 0 else 3
        added = 1 + number % 2
        new = states(rows, added, 10 + number), states(rows, added, 30 + number)
        for one, other in zip(ours.update(*new, 0), plain.update(*new, 0), strict=True):
            assert torch.equal(one, other)
        assert ours.get_seq_length() == plain.get_seq_length()


def test_a_decode_step_writes_in_place() -> None:
    cache = DynamicCache()
    cache.update(states(2, 5, 0), states(2, 5, 1), 0)
    with torch.no_grad():
        grow(cache)
    place = cache.update(states(2, 1, 2), states(2, 1, 3), 0)[0].data_ptr()
    for number in range(growing_cache.ROOM - 1):
        assert cache.update(states(2, 1, number), states(2, 1, number), 0)[0].data_ptr() == place
    assert cache.update(states(2, 1, 2), states(2, 1, 3), 0)[0].data_ptr() != place


def test_only_passes_without_gradients_use_it() -> None:
    model = random_model()
    ids, mask = torch.arange(10, 16)[None], torch.ones(1, 6, dtype=torch.bool)
    _, cache = model.step(ids, mask, torch.arange(6)[None])
    assert type(cache.layers[0]) is DynamicLayer
    with torch.no_grad():
        _, cache = model.step(ids, mask, torch.arange(6)[None])
    assert type(cache.layers[0]) is GrowingLayer
