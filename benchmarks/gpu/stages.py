"""Short runs of every stage on a tiny model and the testbed, for checks that compare two runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from benchmarks import models
from benchmarks.gpu.outcome import Context
from rlhf.callbacks.checkpoints import save
from rlhf.running.build import build_stage, build_trainer
from rlhf.storage.metrics_file import read_rows
from rlhf.testing import compose_config

COMMON = (
    "recipe=testbed",
    "data.size=64",
    "data.validation=0",
    "stage.batch_size=8",
    "stage.micro_batch_size=null",
    "scheduler=constant",
    "optimizer.lr=1e-3",
    "optimizer.eps=1e-5",  # otherwise a gradient near 0 moves its weight by a whole step, in a direction of rounding
    "trainer.limit_val_batches=0",
    "callbacks=quiet",
    "callbacks.checkpoints=null",
)
# Scores as they are: responses of random weights hardly ever end, so that all would get the penalty.
SCORED = ("sampler.max_new_tokens=16", "stage.missing_eos=none")
SAMPLED = (*SCORED, "stage.steps=2", "stage.minibatches=2", "stage.text_length=32", "text.size=64")
#: stage -> its overrides
STAGES: dict[str, tuple[str, ...]] = {
    "pretrain": ("stage.context=64",),
    "sft": (),
    "reward_model": (),
    "dpo": (),
    "rejection_sampling": (*SCORED, "sampler.samples=2"),
    "ppo": (*SAMPLED, "objective.gamma=1.0"),
    "grpo": (*SAMPLED, "sampler.samples=4"),
    "rloo": (*SAMPLED, "sampler.samples=4"),
}


@dataclass
class Run:
    """Result of a short run: the rows of metrics.csv, and the trained weights on the CPU."""

    rows: list[dict[str, float]]
    weights: dict[str, Tensor] = field(repr=False)
    updates: int


class Interruption(Exception):
    """End of a run that ``interrupt`` asked for."""


class Interrupt(pl.Callback):
    """Callback that saves a checkpoint after one batch, and ends the run after the next."""

    def __init__(self, folder: Path, after: int = 1) -> None:
        self.folder, self.after = folder, after

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Save, or end the run."""
        done = trainer.fit_loop.total_batch_idx + 1
        if done == self.after:
            save(trainer, self.folder)
        if done > self.after:
            raise Interruption


def run(
    name: str,
    context: Context,
    folder: Path,
    *words: str,
    device: str | None = None,
    model: str = "tiny",
    batches: int = 3,
    callbacks: Sequence[pl.Callback] = (),
    plugin: Any = None,
    resume: Path | None = None,
) -> Run:
    """Train a stage for a few batches; return its metrics and weights.

    Args:
        name: Stage.
        context: Context of the check.
        folder: Run directory.
        words: Further overrides.
        device: Another device than the context's.
        model: Model of ``benchmarks.models``.
        batches: Most training batches.
        callbacks: Further callbacks.
        plugin: Precision plugin in place of the trainer's.
        resume: Checkpoint to resume from.
    """
    device = device or context.device
    policy = models.model_folder(model)
    inputs = [f"inputs.policy={policy}"]
    if set(SCORED) <= set(STAGES[name]):
        inputs.append(f"inputs.reward_model={models.reward_folder(policy)}")
    trainer_words = [f"trainer={'gpu' if device == 'cuda' else 'cpu'}", f"+trainer.limit_train_batches={batches}"]
    folder.mkdir(parents=True, exist_ok=True)
    config = compose_config(f"stage={name}", *COMMON, *STAGES[name], *inputs, *trainer_words, *words)
    torch.manual_seed(0)
    stage = build_stage(config, folder)
    trainer, _ = build_trainer(config, folder)
    trainer.callbacks += callbacks  # type: ignore[attr-defined]
    if plugin is not None:
        trainer.strategy.precision_plugin = plugin
    trainer.fit(stage, ckpt_path=resume)
    weights = {key: value.detach().cpu().clone() for key, value in stage.named_parameters() if value.requires_grad}
    rows = [{key: float(value) for key, value in row.items()} for row in read_rows(folder / "metrics.csv")]
    return Run(rows, weights, stage.updates_done)
