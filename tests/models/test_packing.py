"""Documents in a packed row get the hidden states that they have alone, whatever the architecture."""

import pytest
import torch

from rlhf.data.collate import TokenBatch
from tests.models.test_dropout import ARCHITECTURES, built


@pytest.mark.parametrize("is_free", [False, True])
@pytest.mark.parametrize("family", ARCHITECTURES)
@torch.no_grad()
def test_packed_documents_are_independent(family: str, is_free: bool) -> None:
    model = built(family).disable_dropout().eval()
    if is_free:
        model.enable_padding_free()
    first, second = torch.arange(10, 17), torch.arange(40, 45)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    packed = model.hidden(TokenBatch.of(torch.cat([first, second])[None], torch.ones(1, 12), position_ids=positions))[0]
    alone = torch.cat([model.hidden(TokenBatch.of(row[None], torch.ones(1, len(row))))[0] for row in (first, second)])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
