"""Optimizers and schedules as the YAML files configure them."""

import importlib
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from rlhf.models.optimizers import adamw
from rlhf.models.schedule import Constant, Cosine, Linear

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.parametrize("file", sorted((CONF / "optimizer").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_optimizer_trains_and_resumes(file: Path) -> None:
    node = OmegaConf.load(file)
    node.lr = 0.01
    build = instantiate(node)

    def run(steps: int, state: dict | None = None, weights: torch.Tensor | None = None) -> tuple[torch.Tensor, dict]:
        weight = torch.nn.Parameter(torch.ones(64, 128) if weights is None else weights.clone())
        vector = torch.nn.Parameter(torch.ones(4))
        optimizer = build([{"params": [weight]}, {"params": [vector], "weight_decay": 0.0}])
        if state:
            optimizer.load_state_dict(state)
        for _ in range(steps):
            ((weight - 0.5) ** 2).sum().backward()
            vector.grad = torch.zeros_like(vector)
            optimizer.step()
            optimizer.zero_grad()
        assert (vector == 1).all()
        return weight.detach(), optimizer.state_dict()

    half, state = run(2)
    whole, _ = run(4)
    assert (whole < half).all() and (half < 1).all()
    assert torch.equal(run(2, state, half)[0], whole)


def test_a_fused_update_is_that_of_the_plain_optimizer() -> None:
    def run(fused: bool) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 96).view(8, 12))
        optimizer = adamw([weight], lr=0.01, weight_decay=0.1, fused=fused)
        for _ in range(5):
            (weight**3).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return weight.detach()

    torch.testing.assert_close(run(True), run(False), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("group", ["adapter", "precision", "scheduler"])
def test_every_option_builds(group: str) -> None:
    files = list((CONF / group).glob("*.yaml"))
    assert files
    for file in files:
        node = OmegaConf.load(file)
        made = instantiate(node)
        module, _, name = node["_target_"].rpartition(".")
        assert type(made) is getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("schedule", [Constant(0.25), Linear(0.25, 0.1), Cosine(0.25, 0.1)])
def test_schedules_by_hand(schedule: Constant) -> None:
    factors = [schedule(step, 20) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5] == 1.0 and all(0 < factor <= 1 for factor in factors)
    assert schedule(20, 20) == pytest.approx(getattr(schedule, "minimum", 1.0))
    assert factors[5:] == sorted(factors[5:], reverse=True)


def test_a_short_run_has_a_warm_up():
    """3% of 20 updates is less than one, whose factor would be 1: five updates as in Llama 2, up to half the run."""
    assert [Cosine()(step, 20) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert [Cosine()(step, 6) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert Cosine()(0, 2) == 0.5 and Cosine()(0, 1) == 0.5
    assert [Cosine(min_warmup=0)(step, 20) for step in range(2)] == [1.0, 1.0]
    assert Cosine()(9, 1000) == pytest.approx(1 / 3)  # 30 updates
    assert Constant()(0, 20) == Linear()(0, 20) == 1.0  # no warm-up was configured


def test_the_factor_halfway_through_the_decay() -> None:
    assert Cosine(0.0, 0.1)(10, 20) == pytest.approx(0.55)
    assert Linear(0.0, 0.0)(10, 20) == pytest.approx(0.5)
    assert Constant()(0, 0) == 1.0
