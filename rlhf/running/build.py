"""Training of one step from its config: the only module that builds objects from config groups."""

import shutil
import statistics
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import get_class, get_object, instantiate
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from omegaconf import DictConfig, OmegaConf

from rlhf.annotator.base import Annotator
from rlhf.callbacks.checkpoints import AtomicCheckpointIO, latest
from rlhf.console import silence_libraries
from rlhf.data import contamination
from rlhf.data.split import Split, load_split
from rlhf.errors import renaming
from rlhf.importing import build_option
from rlhf.logger.loggers import log_config, log_samples, loggers
from rlhf.models.footprint import measure_footprint
from rlhf.models.weight_casts import keep_casts
from rlhf.planning.checks.shared_base import shared_base
from rlhf.planning.validation.stage import find_unread_data
from rlhf.reward.base import Reward
from rlhf.reward.model import find_model_rewards
from rlhf.runs.data_source import DataSource, is_data
from rlhf.signatures import groups
from rlhf.stage.base import Stage
from rlhf.stage.batch_order import derive_seed
from rlhf.stage.strategies import is_sharded

SPECIAL = ("model", "adapter", "precision", "stage", "trainer", "logger", "callbacks")


class Clock(pl.Callback):
    """Callback that measures the seconds of each training batch, for the summary."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Record the start of a batch."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Append the seconds that the batch took."""
        self.seconds.append(time.perf_counter() - self._start)


def _build_group(name: str, node: DictConfig) -> Any:
    """Build the object of a group, and load it if it is data; errors of data name the group."""
    with renaming("data", name) if is_data(get_object(node._target_)) else nullcontext():
        built = build_option(node)
    return load_split(built, name) if isinstance(built, DataSource) else built


def build_stage(config: DictConfig, folder: Path, loaded: Mapping[str, Any] | None = None) -> Stage:
    """Build the stage of a step's config: data first, because its errors are cheap to find, then models.

    Args:
        config: Resolved config of one step.
        folder: Its run directory.
        loaded: Group name -> data that is loaded already.

    Raises:
        UserError: For errors that the user can fix.
    """
    stage_class: type[Stage] = get_class(config.stage._target_)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    base, unread = shared_base(plain), find_unread_data(plain)
    parts: dict[str, Any] = {}
    for name in groups(stage_class):
        if name in SPECIAL or name not in config:
            continue
        if name in unread:
            parts[name] = None
            continue
        if loaded and name in loaded:
            parts[name] = loaded[name]
            continue
        parts[name] = None if config[name] is None else _build_group(name, config[name])
    precision = instantiate(config.precision)
    data = parts.get("data")
    corpus = data.texts if isinstance(data, Split) else None
    spec, adapter = instantiate(config.model, _convert_="all"), instantiate(config.adapter)
    for part in parts.values():
        rewards = part.rewards.values() if isinstance(part, Annotator) else [part] if isinstance(part, Reward) else []
        for model in [model for reward in rewards for model in find_model_rewards(reward).values()]:
            model.load(base if base is None else base.load(corpus))
    if base is None:
        parts["model"] = stage_class.load_model(spec, adapter, precision, corpus)
    else:
        parts["model"] = base.policy(corpus)
    hyperparameters: dict[str, Any] = OmegaConf.to_container(config.stage, resolve=True)  # type: ignore[assignment]
    stage = stage_class(
        **parts, **{name: value for name, value in hyperparameters.items() if name not in ("_target_", "name")}
    )
    stage.seed, stage.run_directory, stage.name = derive_step_seed(config), folder, config.stage.name
    # FSDP gathers weights in 16 bits itself.
    if precision.is_mixed and precision.keep_casts and not is_sharded(plain.get("trainer") or {}):
        keep_casts(stage.models(), precision.compute)
    return stage


def derive_step_seed(config: DictConfig) -> int:
    """Derive the seed of all random numbers of a run from the command's seed, its stage and its round.

    The round counts the runs of the stage in the run's lineage, so that the rounds of a pipeline draw different
    numbers, and a stage run alone equals the run that a pipeline makes of it. Steps of the same stage that are not in
    each other's lineage (two collections, two reward models) have branches. Jobs of a sweep that differ in
    hyperparameters, here or upstream, draw the same numbers, so that they can be compared in pairs.
    """
    parts = (int(config.seed), str(config.stage.name), int(config.get("round", 1)))
    branch = int(config.get("branch", 1))
    return derive_seed(*parts) if branch == 1 else derive_seed(*parts, branch)


def build_trainer(config: DictConfig, folder: Path) -> tuple[pl.Trainer, Clock]:
    """Build the Lightning trainer, which logs to files of the run directory, and its `Clock`."""
    clock = Clock()
    callbacks = [instantiate(node) for node in (config.callbacks or {}).values() if node is not None]
    precision = instantiate(config.precision)
    if config.trainer.accelerator == "cpu":
        precision.check("cpu")
    trainer = instantiate(
        config.trainer,
        precision=precision.trainer,
        max_epochs=1,
        logger=loggers(instantiate(config.logger) if config.logger else None, folder),
        callbacks=[*callbacks, clock],
        default_root_dir=str(folder),
        enable_checkpointing=any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
        enable_progress_bar=any(isinstance(c, pl.callbacks.ProgressBar) for c in callbacks),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    return trainer, clock


def train(config: DictConfig, folder: Path, resume: bool) -> dict[str, float]:
    """Train one step in its run directory; resume from its last checkpoint if there is one and ``resume`` is set.

    Returns:
        The final metrics; the value of the stage's headline metric is among them as ``headline``.
    """
    silence_libraries()
    torch.manual_seed(derive_step_seed(config))
    stage = build_stage(config, folder)
    trainer, clock = build_trainer(config, folder)
    held = measure_footprint(stage.roles())
    if len(held.roles) > 1 and trainer.is_global_zero:
        print(f"  {stage.name}: {held}", flush=True)
    if trainer.is_global_zero:
        for line in contamination.check_stage(folder, getattr(stage, "data", None)):
            print(f"  {stage.name}: {line}", flush=True)
        if stage.produces == "model":
            contamination.save_prompt_hashes(folder, getattr(stage, "data", None))
    plain = OmegaConf.to_container(config, resolve=True)
    log_config(trainer.loggers, plain, folder)  # type: ignore[arg-type]
    checkpoint = latest(folder) if resume else None
    started = time.perf_counter()
    if stage.produces == "model":
        trainer.fit(stage, ckpt_path=checkpoint)
        if trainer.is_global_zero:
            _save(stage, folder / "model")
            stage.write_samples()
            log_samples(trainer.loggers, folder)
    else:
        trainer.predict(stage, return_predictions=False)
    seconds = time.perf_counter() - started
    found: dict[str, Any] = {**trainer.callback_metrics, **stage.final_metrics()}
    metrics = {name: float(value) for name, value in found.items()}
    if clock.seconds:
        busy = sum(clock.seconds)
        metrics["step_seconds_median"] = statistics.median(clock.seconds)
        metrics["tokens_per_second"] = stage.tokens_seen / busy
        metrics["samples_per_second"] = stage.examples_seen / busy
    metrics["train_seconds"] = seconds
    metrics |= held.numbers()
    if stage.headline in metrics:
        metrics["headline"] = metrics[stage.headline]
    return metrics


def _save(stage: Stage, folder: Path) -> None:
    """Save to a temporary directory and rename it, so that a directory named ``model`` is always complete."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    stage.save(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
