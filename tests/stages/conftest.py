"""Model of 30 thousand weights, a small world, and a trainer for each test."""

import copy
import itertools
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest
import pytorch_lightning as pl
import torch

from rlhf.console import silence_libraries
from rlhf.data.data import Data
from rlhf.data.split import Split
from rlhf.logger.loggers import loggers
from rlhf.models.adapters import LoRA, NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.language_model import LanguageModel
from rlhf.models.precision import Precision
from rlhf.reward.base import Reward
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.stage import rollout_metrics
from rlhf.stage.base import Stage

ARCHITECTURE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


@cache
def data(record: str, size: int = 32, validation: int = 8) -> Split:
    """Load a few records of the testbed."""
    return Data(record, "testbed", size, validation, 96).load()


@pytest.fixture(autouse=True)
def _undrawn(undrawn: None) -> None:
    """Disable figures."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a saved model with its tokenizer, so that every test starts from the same weights."""
    torch.manual_seed(0)
    spec = CausalLM(None, ARCHITECTURE, 320)
    model = spec.load(NoAdapter(), Precision("32-true"), corpus=data("demonstration", 200).texts)
    path = tmp_path_factory.mktemp("model")
    model.save(path)
    return path


@cache
def _read(folder: Path, lora: bool) -> tuple[LanguageModel, torch.Tensor]:
    """Return the model of ``folder``, and the state of torch's generator after it was loaded."""
    torch.manual_seed(1)
    adapter = LoRA(rank=4, alpha=8.0) if lora else NoAdapter()
    return CausalLM(str(folder), None, None).load(adapter, Precision("32-true")), torch.get_rng_state()


@pytest.fixture
def load(folder: Path) -> Callable[..., LanguageModel]:
    """Return a function that copies the model of ``folder`` (with LoRA if requested) and restores the generator."""

    def make(lora: bool = False) -> LanguageModel:
        model, state = _read(folder, lora)
        torch.set_rng_state(state)
        return copy.deepcopy(model)

    return make


@pytest.fixture
def whole_start() -> None:
    """Measure the start on as many prompts as a run does, where ``_short_start`` would measure it on a few."""


@pytest.fixture(autouse=True)
def _short_start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the start of a policy on few prompts: sampling all of them takes as long as training a tiny model."""
    if "whole_start" not in request.fixturenames:
        monkeypatch.setattr(rollout_metrics, "START", 8)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """Build an optimizer whose steps are large enough to measure."""
    return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-5)


def constant(step: int, total: int) -> float:
    """Return a constant factor: no schedule."""
    return 1.0


def fit(stage: Stage, folder: Path, resume: Path | None = None, **arguments: Any) -> dict[str, float]:
    """Train as ``rlhf.running.build.train`` does; return the last metrics."""
    silence_libraries()
    warnings.filterwarnings("ignore", category=FutureWarning)
    stage.run_directory = folder
    folder.mkdir(parents=True, exist_ok=True)
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": loggers(None, folder),
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "use_distributed_sampler": False,
            "default_root_dir": str(folder),
            **arguments,
        }
    )
    trainer.fit(stage, ckpt_path=resume)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


class Scored(Reward):
    """A reward given as a function of the rollout."""

    log_odds = 1.0

    def __init__(self, function):
        self.function = function

    def __call__(self, rollout):
        return self.function(rollout)


S = TypeVar("S", bound=AncestralSampler)


def dies(sampler: S, batches: int) -> S:
    """Return the sampler, killed when one batch more than `batches` is requested."""
    sample, asked = sampler.sample, itertools.count(1)

    def until_killed(*arguments: Any, **named: Any) -> Any:
        if next(asked) > batches:
            raise KeyboardInterrupt
        return sample(*arguments, **named)

    sampler.sample = until_killed  # type: ignore[method-assign]
    return sampler


def weights(stage: Stage) -> dict[str, torch.Tensor]:
    """Return all parameters of a stage, detached."""
    return {name: value.detach().clone() for name, value in stage.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Return whether two sets of weights have the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
