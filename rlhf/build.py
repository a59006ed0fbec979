"""From a step's config to a trained model: the only place that builds objects from config groups."""

import logging
import shutil
import statistics
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from rlhf import held_out, validation
from rlhf.checkpoints import AtomicCheckpointIO, latest
from rlhf.errors import RLHFError
from rlhf.metrics import log_config, log_samples, loggers
from rlhf.models.footprint import footprint
from rlhf.scoring import model_rewards
from rlhf.sharing import shared_base
from rlhf.stage import Stage, seed_of
from rlhf.validation import groups

SPECIAL = ("model", "adapter", "precision", "stage", "trainer", "logger", "callbacks")


class Clock(pl.Callback):
    """Seconds of each training batch, for the summary."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def build_stage(config: DictConfig, folder: Path, loaded: Mapping[str, Any] | None = None) -> Stage:
    """Builds the stage of a step's config: what reads nothing first, then data, because its errors are cheap to find.

    Args:
        config: Of one step, resolved.
        folder: Its run folder.
        loaded: Groups of data that are loaded already, by name.

    Raises UserError for what the user can mend.
    """
    stage_class: type[Stage] = get_class(config.stage._target_)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    base, unread = shared_base(plain), validation.unread(plain)
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
        built: Any = None if config[name] is None else instantiated(config[name])
        parts[name] = built.load() if hasattr(built, "digest") else built
    precision = instantiate(config.precision)
    corpus = getattr(parts.get("data"), "texts", None)
    spec, adapter = instantiate(config.model, _convert_="all"), instantiate(config.adapter)
    rewards = [reward for part in parts.values() for reward in model_rewards(part).values()]
    for reward in rewards:
        reward.load(base if base is None else base.load(corpus))
    if base is None:
        parts["model"] = stage_class.load_model(spec, adapter, precision, corpus)
    else:
        parts["model"] = base.policy(corpus)
    knobs: dict[str, Any] = OmegaConf.to_container(config.stage, resolve=True)  # type: ignore[assignment]
    stage = stage_class(**parts, **{name: value for name, value in knobs.items() if name not in ("_target_", "name")})
    stage.seed, stage.run_folder, stage.name = seed_of_step(config), folder, config.stage.name
    return stage


def instantiated(node: Any) -> Any:
    """What a node describes; what a constructor says to the user, without the error that Hydra wraps it in."""
    try:
        return instantiate(node)
    except InstantiationException as error:
        cause = error.__cause__
        while cause is not None and not isinstance(cause, RLHFError):
            cause = cause.__cause__
        if cause is None:
            raise
    raise cause  # outside of the block, or each of the two errors would be the reason of the other


def seed_of_step(config: DictConfig) -> int:
    """Derive the seed of all random numbers of a run from the command's seed, its stage and its round.

    The round says which run of the stage this is in its own lineage, so that the rounds of a pipeline draw numbers of
    their own, and a stage run on its own is the run that a pipeline makes of it. Steps of one stage side by side
    (two collections, two reward models) have branches. Jobs of a sweep that differ in hyperparameters, here or
    upstream, draw the same numbers, so that they can be compared in pairs.
    """
    parts = (int(config.seed), str(config.stage.name), int(config.get("round", 1)))
    branch = int(config.get("branch", 1))
    return seed_of(*parts) if branch == 1 else seed_of(*parts, branch)


def build_trainer(config: DictConfig, folder: Path) -> tuple[pl.Trainer, Clock]:
    """The Lightning trainer, with the run's files as its logger."""
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
    # Strategies that shard write folders of their own, and refuse to be given a writer.
    with suppress(MisconfigurationException, NotImplementedError):
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    return trainer, clock


def train(config: DictConfig, folder: Path, resume: bool) -> dict[str, float]:
    """Runs one step in its run folder, from its last checkpoint when there is one and ``resume`` is set.

    Returns the final metrics; the stage's headline is among them as ``headline``.
    """
    quiet()
    torch.manual_seed(seed_of_step(config))
    stage = build_stage(config, folder)
    trainer, clock = build_trainer(config, folder)
    held = footprint(stage.roles())
    if len(held.roles) > 1 and trainer.is_global_zero:
        print(f"  {stage.name}: {held}", flush=True)
    if trainer.is_global_zero:
        for line in held_out.of_stage(folder, getattr(stage, "data", None)):
            print(f"  {stage.name}: {line}", flush=True)
        if stage.produces == "model":
            held_out.write(folder, getattr(stage, "data", None))
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
    """Saves beside and renames: a folder named ``model`` is always whole."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    stage.save(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def quiet() -> None:
    """Keeps libraries' notes that say nothing to the user off the screen."""
    for name in ("pytorch_lightning", "lightning", "bitsandbytes", "transformers", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for pattern in ("many workers", "not resumable", "log_every_n_steps", "LeafSpec", "predict returned None"):
        warnings.filterwarnings("ignore", message=f".*{pattern}.*")
