"""Warning of `rlhf inspect plan` about a learning rate outside of the usual range for the model's size and adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from rlhf import discovery
from rlhf.cli import main
from rlhf.inspection.learning_rates import ADAPTER, FINE_TUNING, PRETRAINING, unusual_rate
from rlhf.inspection.roles import Role
from rlhf.planning.step import Step
from tests.conf.conftest import composed  # noqa: F401  # fixture
from tests.inspection.conftest import MODEL, SMALL

STAGES = ("pretrain", "sft", "reward_model", "rejection_sampling", "dpo", "kto", "ppo", "grpo", "rloo")


def warned(
    rate: float,
    weights: float,
    adapter: str = "none",
    given: bool = True,
    optimizer: str = "adamw",
    own: dict[str, Any] | None = None,
) -> str:
    target = OmegaConf.load(discovery.conf_dir() / "adapter" / f"{adapter}.yaml")._target_
    config = {
        "adapter": {"_target_": target},
        "model": {"path": "given" if given else None},
        "optimizer": {"_target_": f"rlhf.models.optimizers.{optimizer}", "lr": rate},
    }
    step = Step("sft", "sft", config, "", Path(), {}, {}, "", own or {})
    trained = int(weights) if adapter == "none" else 1000
    roles = [Role("policy", int(weights), trained, 0, 0, 0), Role("reference", 10**12, 0, 0, 0, 0)]
    return str(unusual_rate(step, roles) or "")


@pytest.mark.parametrize(
    ("rate", "weights", "adapter", "usual"),
    [
        (1.5e-3, 0.9e6, "none", True),  # the testbed's SFT
        (1.5e-3, 135e6, "none", False),
        (1e-3, 135e6, "none", True),  # SmolLM2-135M-Instruct
        (3e-4, 1.7e9, "none", True),  # SmolLM2-1.7B-Instruct
        (2e-4, 1e9, "lora", True),
        (1e-4, 8e9, "none", False),
        (2e-5, 7e9, "none", True),  # Llama 2's SFT
        (2e-4, 7e9, "qlora", True),  # QLoRA
        (5e-6, 7e9, "qlora", True),  # Zephyr's DPO
        (2e-3, 7e9, "lora", False),
        (5e-8, 7e9, "none", False),
        (2e-5, 0.9e6, "none", False),
    ],
)
def test_published_rates_are_usual_and_others_are_not(rate: float, weights: float, adapter: str, usual: bool) -> None:
    assert (warned(rate, weights, adapter) == "") == usual


def test_random_weights_take_the_rates_of_pretraining() -> None:
    """GPT-3 125M 6e-4 and 6.7B 1.2e-4, Llama 2 7B 3e-4, SmolLM2 135M 3e-3, as published."""
    for rate, weights in ((6e-4, 125e6), (1.2e-4, 6.7e9), (3e-4, 6.7e9), (3e-3, 135e6), (4e-4, 1.1e9)):
        assert warned(rate, weights, given=False) == ""
    assert warned(1e-5, 1e9, given=False) and warned(3e-3, 7e9, given=False)


def test_the_range_of_lion_is_five_times_lower() -> None:
    warning = warned(2e-5, 7e9, optimizer="lion_8bit")
    assert warning.startswith("optimizer.lr=2e-05: is above the usual 2e-08")
    assert warned(4e-6, 7e9, optimizer="lion_8bit") == ""


def test_the_warning_names_the_key_as_it_is_typed() -> None:
    assert warned(1e-4, 8e9) == (
        "optimizer.lr=0.0001: is above the usual 1e-07 to 5e-05 for fine-tuning all of 8.0B weights "
        "(Zephyr's DPO 5e-7, PPO of Llama 2 1e-6, its SFT 2e-5); type optimizer.lr=5e-05 or less"
    )
    assert warned(2e-5, 0.9e6).endswith("; type optimizer.lr=0.0001 or more, or recipe=testbed")
    assert "type sft.optimizer.lr=5e-05 or less" in warned(1e-4, 8e9, own={"optimizer": {"lr": 1e-4}})


def test_ranges_are_in_order_and_cover_every_size() -> None:
    for table in (PRETRAINING, FINE_TUNING, ADAPTER):
        assert [one.weights for one in table] == sorted(one.weights for one in table)
        assert table[-1].weights == float("inf") and all(one.low < one.high and one.source for one in table)


@pytest.mark.parametrize("stage", STAGES)
def test_defaults_are_usual_from_135m_to_8b(composed: Callable[..., DictConfig], stage: str) -> None:  # noqa: F811
    for adapter in ("none", "lora"):
        words = (f"stage={stage}", f"adapter={adapter}")
        rate = composed(*words).optimizer.lr
        for weights in (135e6, 1e9, 8e9):
            given = stage != "pretrain" or adapter != "none"
            assert warned(rate, weights, adapter, given) == "", (adapter, weights)
        assert warned(composed(*words, "recipe=testbed").optimizer.lr, 0.9e6, adapter) == ""


def test_the_page_warns_of_a_model_with_too_high_a_rate(capsys: pytest.CaptureFixture[str]) -> None:
    """The plan of the testbed's defaults has no warning; the testbed's model at a rate of 0.1 has one."""
    for rate, count in (((), 0), (("optimizer.lr=0.1",), 1)):
        assert main.run(["inspect", "plan", "stage=sft", *SMALL, *MODEL, *rate]) == 0
        assert capsys.readouterr().out.count("optimizer.lr=0.1: is above the usual") == count
