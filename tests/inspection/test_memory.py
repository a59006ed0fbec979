"""Predicted memory of training passes, against the tensors that real training steps allocate."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from rlhf.importing import build_option
from rlhf.inspection.composing import Look, planned, read_examples
from rlhf.inspection.memory import AllocationPeak, Passes, peak, training_pass
from rlhf.inspection.plan_page import show
from rlhf.inspection.roles import Role, roles_of
from rlhf.inspection.work import work_of
from rlhf.models.weight_casts import kept_casts
from rlhf.running.build import build_stage
from rlhf.sampler.weight_copy import WeightCopy
from tests.inspection.conftest import MODEL, SMALL
from tests.stages.conftest import fit


def test_only_what_is_alive_at_the_same_time_is_counted() -> None:
    weight = torch.ones(1000)
    with AllocationPeak([weight]) as allocated:
        first = weight * 2  # 4000 bytes
        view = first[:10]
        second = first + weight.view(1000)
        del first
        third = second + 1  # the first one is kept by its view
        del view
        fourth = third + 1
    assert allocated.peak == allocated.live == 4000 * 3
    del second, third, fourth
    assert allocated.live == 0


def test_the_peak_is_that_of_the_largest_phase() -> None:
    roles = [Role("policy", 0, 0, 100, 50, 200, largest=30), Role("reference", 0, 0, 100, 0, 0)]
    assert peak(roles, Passes(training=300, sampling=20)) == 400 + 300
    assert peak(roles, Passes(training=90, sampling=20)) == 400 + 50 + 2 * 30  # the update
    assert peak(roles, Passes(training=None, sampling=700)) == 400 + 700


def test_an_offloaded_model_counts_while_it_scores() -> None:
    held = Role("policy", 0, 0, 100, 50, 200, largest=30)
    frozen = [Role(name, 0, 0, size, 0, 0, offloaded=True) for name, size in (("reference", 100), ("reward", 400))]
    assert peak([held, *frozen], Passes(training=300, sampling=20)) == 300 + 400  # all reward models, no training pass
    assert peak([held, *frozen], Passes(training=500, sampling=20)) == 300 + 500


def test_a_training_pass_that_cannot_be_measured_is_reported(
    looked: Callable[..., Look], capsys: pytest.CaptureFixture[str]
) -> None:
    """Grouped multiplications of a mixture of experts have no float32 form for fake tensors in torch 2.13."""
    words = ["stage=sft", *SMALL, *MODEL, "+model.architecture.model_type=mixtral"]
    show(words)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "not in the peak:" in line]
    assert "training pass" in row and " ? " in row and "it does not run on fake tensors (RuntimeError" in row


def test_the_samplers_copy_is_counted(looked: Callable[..., Look], tmp_path: Path) -> None:
    step = looked("stage=sft", *SMALL).steps[-1]
    policy = build_stage(OmegaConf.create(step.config), step.folder).policy
    policy.save(tmp_path / "saved")
    words = ["stage=grpo", "recipe=testbed", "reward=gold", f"inputs.policy={tmp_path}/saved", "sampler.precision=bf16"]
    look = Look(planned([*words, *SMALL]).steps)
    (copy,) = [role for role in roles_of(look, look.stage(look.steps[-1])) if role.name == "sampler copy"]
    expected = WeightCopy(torch.bfloat16).of(policy)
    values = [*expected.parameters(), *expected.buffers()]
    assert copy.weights == sum(value.numel() * value.element_size() for value in values)


@pytest.mark.parametrize(
    "words",
    [
        ["stage=sft"],
        ["stage=sft", "stage.micro_batch_size=2"],
        ["stage=sft", "stage.micro_batch_size=2", "adapter=lora"],
        ["stage=sft", "stage.packing=64", "model.gradient_checkpointing=true"],
        ["stage=sft", "model.gradient_checkpointing=2"],
        ["stage=pretrain"],
        ["stage=pretrain", "precision=bf16_true"],
        ["stage=pretrain", "precision=bf16"],
        ["stage=sft", "precision=bf16", "adapter=lora", "model.gradient_checkpointing=true"],
    ],
    ids=" ".join,
)
def test_a_training_pass_needs_the_predicted_memory(looked: Callable[..., Look], words: list[str]) -> None:
    look = looked(*words, *SMALL)
    step = look.steps[-1]
    predicted = look.stage(step)
    read_examples(predicted)
    work = work_of(predicted, step.config)
    expected = training_pass(look, predicted, work, build_option(OmegaConf.create(step.config["precision"])))
    stage = build_stage(OmegaConf.create(step.config), step.folder)
    own, peaks = stage.training_step, list[int]()

    def watched(batch: Any, batch_idx: int) -> None:
        optimizer: Any = stage.optimizers()
        state = [value for values in optimizer.state.values() for value in values.values()]
        copies = kept_casts(stage.policy, torch.bfloat16)
        with AllocationPeak([*stage.parameters(), *stage.buffers(), *state, *copies]) as allocated:
            own(batch, batch_idx)
        peaks.append(allocated.peak)

    stage.training_step = watched  # type: ignore[method-assign]
    fit(stage, step.folder, limit_val_batches=0, precision=step.config["precision"]["trainer"])
    # The first step allocates the optimizer's state as well.
    assert expected == pytest.approx(max(peaks[1:]), rel=0.1)
