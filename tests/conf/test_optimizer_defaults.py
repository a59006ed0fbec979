"""Optimizer defaults that depend on the kind of stage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rlhf.errors import UserError
from rlhf.planning import step_config as configs
from rlhf.planning.plan import plan, recipe_notes
from rlhf.planning.request import read_request
from rlhf.planning.validation.config import validate_config
from rlhf.runs import fingerprint
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


# Peak learning rate of AdamW: all weights, adapter, testbed.
RATES = {
    "pretrain": (3e-4, 2e-4, 3e-3),
    "sft": (2e-5, 2e-4, 1.5e-3),
    "rejection_sampling": (2e-5, 2e-4, 1.5e-3),
    "reward_model": (1e-5, 1e-4, 5e-4),
    "dpo": (5e-7, 5e-6, 2e-4),
    "kto": (5e-7, 5e-6, 2e-4),
    "ppo": (1e-6, 1e-5, 5e-4),
    "grpo": (1e-6, 1e-5, 5e-4),
    "rloo": (1e-6, 1e-5, 5e-4),
}


def test_every_stage_that_trains_has_a_published_rate() -> None:
    assert set(RATES) == set(STAGES)


@pytest.mark.parametrize("stage", RATES)
def test_the_rate_depends_on_the_adapter_and_the_recipe(stage: str, composed: Callable[..., DictConfig]) -> None:
    full, adapter, testbed = RATES[stage]
    assert composed(f"stage={stage}").optimizer.lr == full
    for name in ("lora", "dora", "qlora"):
        assert composed(f"stage={stage}", f"adapter={name}").optimizer.lr == adapter
        assert composed(f"stage={stage}", f"adapter={name}", "recipe=testbed").optimizer.lr == testbed
    assert composed(f"stage={stage}", "recipe=testbed").optimizer.lr == testbed


def test_lion_gets_a_fifth_of_the_rate(composed: Callable[..., DictConfig]) -> None:
    """Chen et al. 2023: a rate 3 to 10 times smaller than AdamW's."""
    assert composed("stage=sft", "optimizer=lion_8bit").optimizer.lr == 4e-6
    assert composed("stage=sft", "optimizer=lion_8bit", "adapter=lora").optimizer.lr == 4e-5
    assert composed("stage=sft", "optimizer=lion_8bit", "recipe=testbed").optimizer.lr == 3e-4
    for name in ("adamw_8bit", "paged_adamw_8bit", "rmsprop"):
        assert composed("stage=sft", f"optimizer={name}").optimizer.lr == 2e-5


def test_a_typed_rate_is_used_as_it_is(composed: Callable[..., DictConfig]) -> None:
    config = composed("stage=sft", "optimizer=lion_8bit", "adapter=lora", "recipe=testbed", "optimizer.lr=7e-5")
    assert config.optimizer.lr == 7e-5


def test_pipelines_use_the_recipe_of_the_testbed_and_each_step_its_own_adapter(
    composed: Callable[..., DictConfig],
) -> None:
    def rates(*words: str) -> dict[str, float]:
        everything = plain(composed("pipeline=instructgpt", *words))
        return {
            step: configs.resolve(
                {key: configs.step_config(everything, step)[key] for key in ("adapter", "optimizer", "recipe")}
            )["optimizer"]["lr"]
            for step in ("pretrain", "sft", "reward_model", "align")
        }

    assert list(rates().values()) == [3e-3, 1.5e-3, 5e-4, 5e-4]
    assert rates("stage@align=dpo")["align"] == 2e-4
    published = rates("recipe=published", "adapter=lora", "stage@align=dpo")
    assert list(published.values()) == [3e-4, 2e-4, 1e-4, 5e-6]  # the pretrained model has random weights: no adapter
    assert rates("+align.recipe=published")["align"] == 1e-6


def test_values_of_the_recipe_in_data_sampler_and_comparison(composed: Callable[..., DictConfig]) -> None:
    published, testbed = composed("stage=ppo"), composed("stage=ppo", "recipe=testbed")
    assert (published.data.max_length, testbed.data.max_length) == (1024, 128)
    assert (published.sampler.max_new_tokens, testbed.sampler.max_new_tokens) == (256, 32)
    assert (published.stage.batch_size, testbed.stage.batch_size) == (512, 128)
    compare = composed("pipeline=instructgpt", "recipe=published").compare
    assert (compare.max_new_tokens, compare.data.max_length) == (256, 1024)


def test_an_unknown_recipe_is_refused_in_one_line(
    composed: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (("stage=sft",), ("pipeline=instructgpt",)):
        with pytest.raises(UserError) as caught:
            plan(composed(*words, "recipe=test"))
        assert str(caught.value) == "recipe=test: no such recipe; type recipe=published or recipe=testbed"


def test_a_pipeline_with_a_given_model_and_the_recipe_of_the_testbed_has_a_note(
    composed: Callable[..., DictConfig],
) -> None:
    def notes(*words: str) -> list[str]:
        return recipe_notes(read_request(composed(*words), words))

    (note,) = notes("pipeline=dpo", "model.path=ORG/MODEL")
    assert note.startswith("recipe=testbed: has learning rates") and note.endswith("; type recipe=published")
    assert notes("pipeline=dpo") == notes("pipeline=dpo", "model.path=ORG/MODEL", "recipe=published") == []
    assert notes("experiment=smollm2_lora_dpo", "model.path=ORG/MODEL") == []


def test_the_name_of_the_recipe_is_no_part_of_the_fingerprint(composed: Callable[..., DictConfig]) -> None:
    """Equal values are the same run, whether a recipe or the command line sets them."""
    recipe = configs.resolve(plain(composed("stage=sft", "recipe=testbed")))
    typed = ("optimizer.lr=1.5e-3", "stage.batch_size=32", "stage.micro_batch_size=null", "data.max_length=128")
    assert fingerprint.compute(recipe, {}, {}) == fingerprint.compute(
        configs.resolve(plain(composed("stage=sft", *typed))), {}, {}
    )


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
