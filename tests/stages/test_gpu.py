"""Training on a GPU: the numbers of the CPU, resume, and what 16 bits change."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.callbacks.checkpoints import latest
from rlhf.data.records import Message, Prompt
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.storage.metrics_file import read_rows

from .conftest import fit, weights
from .test_exactness import STAGES, Stop

pytestmark = pytest.mark.gpu

GPU: dict[str, Any] = {"accelerator": "gpu", "deterministic": "warn"}


@pytest.fixture(autouse=True)
def _plain_products() -> Iterator[None]:
    """Compute fp32 products in fp32, as TF32 has 10 bits; afterwards let any kernel run again."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.use_deterministic_algorithms(False)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_rows(folder / "metrics.csv") if "loss" in row]


@pytest.mark.parametrize("name", STAGES)
def test_first_updates_are_those_of_the_cpu(name: str, load: Any, tmp_path: Path) -> None:
    for folder, arguments in (("cpu", {}), ("gpu", GPU)):
        fit(STAGES[name](load), tmp_path / folder, limit_train_batches=2, limit_val_batches=0, **arguments)
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_run_resumes(name: str, load: Any, tmp_path: Path) -> None:
    """To 1e-6: kernels that sum in any order may differ in the last bits, although deterministic ones are asked for."""
    whole = STAGES[name](load)
    fit(whole, tmp_path / "whole", **GPU)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(STAGES[name](load), tmp_path / "killed", callbacks=[Stop(2, tmp_path / "killed")], **GPU)
    resumed = STAGES[name](load)
    fit(resumed, tmp_path / "killed", resume=latest(tmp_path / "killed"), **GPU)
    assert resumed.updates_done == whole.updates_done > 0
    expected = weights(whole)
    for key, value in weights(resumed).items():
        torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", ["sft", "reward_model", "dpo"])
def test_a_loss_in_bf16_is_that_of_fp32_to_two_percent(name: str, precision: str, load: Any, tmp_path: Path) -> None:
    for folder, bits in (("fp32", "32-true"), ("bf16", precision)):
        fit(STAGES[name](load), tmp_path / folder, precision=bits, limit_train_batches=1, limit_val_batches=0, **GPU)
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.02)


def test_fp16_trains_and_logs_its_loss_scale(load: Any, tmp_path: Path) -> None:
    stage = STAGES["sft"](load)
    metrics = fit(stage, tmp_path, precision="16-mixed", limit_val_batches=0, **GPU)
    assert metrics["loss_scale"] > 0 and stage.updates_done == len(losses(tmp_path)) > 0


def test_responses_are_those_of_the_cpu(load: Any) -> None:
    policy = load()
    prompts = [Prompt((Message("user", text),)) for text in ("What is ice?", "What is two plus two?")]
    expected, found = (
        AncestralSampler(16, samples=4).sample(policy.to(device), list(prompts), seed=1) for device in ("cpu", "cuda")
    )
    assert torch.equal(found.response_ids.cpu(), expected.response_ids)
    torch.testing.assert_close(found.logp.cpu(), expected.logp, atol=1e-4, rtol=1e-4)
