"""Pages of CPU tensors."""

import os

import pytest

from rlhf.models.machine_memory import use_large_pages


@pytest.mark.parametrize("chosen", [None, "0"])
def test_large_pages_are_requested_unless_the_user_has_chosen(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    if chosen is not None:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", chosen)
    use_large_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == (chosen or "1")
