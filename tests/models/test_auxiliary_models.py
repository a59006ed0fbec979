"""Every stored model with a scalar head in every role: with and without a safety head, under every adapter."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf.data.collate import TokenBatch
from rlhf.errors import UserError
from rlhf.models.adapters import LoRA, NoAdapter, QLoRA
from rlhf.models.auxiliary_models import load_critic
from rlhf.models.causal_lm import CausalLM
from rlhf.models.module_state import check_gradients
from rlhf.models.scalar import SAFETY_HEAD, ScalarModel
from rlhf.models.shared_base import SharedBase
from rlhf.reward.model import ModelReward
from tests.models.conftest import FP32, move_adapter, spec

Batch = tuple[Tensor, Tensor, Tensor]
ADAPTERS = {
    "none": NoAdapter(),
    "lora": LoRA(rank=2),
    "qlora": QLoRA(rank=2),
    "shared": LoRA(rank=2, shared_base=True),
    "shared_qlora": QLoRA(rank=2, shared_base=True),
}


@pytest.fixture(scope="module", params=[False, True], ids=["no safety head", "safety head"])
def stored(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Store a reward model trained with LoRA on the model of ``folder``."""
    torch.manual_seed(2)
    model = ScalarModel.load(folder, LoRA(rank=2))
    move_adapter(model)
    model.scale.fill_(2.0)
    if request.param:
        torch.nn.init.normal_(model.add_safety_head().weight)
    path = tmp_path_factory.mktemp("scorer") / "model"
    model.save(path)
    assert (path / SAFETY_HEAD).exists() == request.param
    return path


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_stored_head_scores_equally_in_every_role(adapter: str, stored: Path, folder: Path, batch: Batch) -> None:
    """As a reward it scores; as a critic it scores the same, and every trained weight gets a gradient."""
    kind, quantised = ADAPTERS[adapter], "qlora" in adapter
    shared = isinstance(kind, LoRA) and kind.shared_base
    if isinstance(kind, LoRA) and shared:
        base = SharedBase.find(spec(folder), kind, FP32, {"stage.value": str(stored)}, trained=["stage.value"])
        policy, reward = base.policy(), ModelReward(str(stored)).load(base)
    else:
        policy, reward = spec(folder).load(kind, FP32), ModelReward(str(stored)).load()
    ids, mask, _ = batch
    scores = reward.model.scores(TokenBatch.of(ids, mask))
    assert not any(value.requires_grad for value in reward.model.parameters())
    if not (quantised and shared):
        torch.testing.assert_close(scores, ScalarModel.load(stored).eval().scores(TokenBatch.of(ids, mask)).detach())

    critic = load_critic(policy, str(stored)).disable_dropout()
    if not quantised or shared:  # else the critic alone is on rounded weights
        torch.testing.assert_close(critic.scores(TokenBatch.of(ids, mask)).detach(), scores, atol=1e-4, rtol=1e-4)
    critic.values(TokenBatch.of(ids, mask)).square().sum().backward()
    check_gradients(critic)
    assert critic.safety_head is None
    assert any(value.requires_grad for value in critic.parameters())


@pytest.mark.parametrize("adapter", ["none", "lora", "qlora"])
def test_a_language_model_has_no_scalar_role(adapter: str, stored: Path) -> None:
    with pytest.raises(UserError, match="a language model is needed here"):
        CausalLM(str(stored), None, None).load(ADAPTERS[adapter], FP32)
