"""Predicted memory of training passes, against the tensors that real training steps allocate."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from rlhf.importing import build_option
from rlhf.inspection.composing import Look, read_examples
from rlhf.inspection.memory import AllocationPeak, Passes, peak, training_pass
from rlhf.inspection.roles import Role
from rlhf.inspection.work import work_of
from rlhf.models.weight_casts import kept_casts
from rlhf.running.build import build_stage
from tests.inspection.conftest import SMALL
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
