"""Optimizer defaults that depend on the kind of stage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rlhf.planning import step_config as configs
from rlhf.planning.validation.config import validate_config
from rlhf.storage.plain import plain
from rlhf_dpo.objective import DPO
from rlhf_dpo.stage import DPOStage
from tests.stages.conftest import constant, data, fit, folder, load, weights  # noqa: F401  # fixtures

ROOT = Path(__file__).resolve().parents[2]
STAGES = sorted(path.stem for path in ROOT.glob("plugins/*/conf/stage/*.yaml") if "optimizer:" in path.read_text())
SAMPLING = ("ppo", "grpo", "rloo")


@pytest.mark.parametrize("stage", STAGES)
def test_the_default_eps_depends_on_the_stage(stage: str, composed: Callable[..., DictConfig]) -> None:
    """1e-5 where advantages are whitened (Huang et al. 2024), 1e-8 elsewhere."""
    assert composed(f"stage={stage}").optimizer.eps == (1e-5 if stage in SAMPLING else 1e-8)


def test_eps_can_be_overridden_and_other_optimizers_use_the_default_of_the_stage(
    composed: Callable[..., DictConfig],
) -> None:
    assert composed("stage=ppo", "optimizer.eps=1e-6").optimizer.eps == 1e-6
    assert composed("stage=ppo", "optimizer=paged_adamw_8bit").optimizer.eps == 1e-5


def test_eps_follows_the_algorithm_of_a_pipeline_step(composed: Callable[..., DictConfig]) -> None:
    for words, expected in (([], 1e-5), (["stage@align=dpo"], 1e-8), (["align.adam_eps=1e-7"], 1e-7)):
        everything = plain(composed("pipeline=instructgpt", *words))
        raw = {step: configs.step_config(everything, step) for step in ("sft", "align")}
        found = {step: OmegaConf.create(config).optimizer.eps for step, config in raw.items()}
        assert found == {"sft": 1e-8, "align": expected}


def test_optimizers_without_an_eps_fit_every_stage(composed: Callable[..., DictConfig]) -> None:
    config = composed("stage=ppo", "optimizer=lion_8bit", "inputs.policy=run", "inputs.reward_model=run")
    assert "eps" not in config.optimizer
    validate_config(config)


def test_a_small_beta_does_not_shorten_the_first_step_of_dpo(
    load: Callable[..., Any],  # noqa: F811
    tmp_path: Path,
    composed: Callable[..., DictConfig],
) -> None:
    """DPO's gradient is proportional to beta at the start, and Adam's step does not depend on its scale.

    With eps = 1e-5 the step at beta = 0.01 was 0.77 of the one at 0.1, so that a sweep over beta measured eps too.
    """
    config = composed("stage=dpo", "inputs.policy=run")
    steps = {}
    for beta in (0.1, 0.01):
        parts = (data("comparison", 16, 2), instantiate(config.optimizer), constant)
        stage = DPOStage(load(), DPO(beta=beta), *parts, batch_size=16)
        before = weights(stage)
        fit(stage, tmp_path / str(beta), limit_train_batches=1, limit_val_batches=0)
        steps[beta] = torch.cat([(value - before[name]).flatten() for name, value in weights(stage).items()])
    assert steps[0.01].norm() / steps[0.1].norm() == pytest.approx(1.0, abs=0.02)
