"""A model of 30 thousand weights, a small world, and a trainer for each test."""

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

from rlhf import policy_gradient
from rlhf.build import quiet
from rlhf.data.data import Data, Split
from rlhf.metrics import loggers
from rlhf.models.adapters import LoRA, NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.language_model import LanguageModel
from rlhf.models.precision import Precision
from rlhf.rollout import Sampler
from rlhf.stage import Stage

ARCHITECTURE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


@cache
def data(record: str, size: int = 32, validation: int = 8) -> Split:
    """A little of the testbed."""
    return Data(record, "testbed", size, validation, 96).load()


@pytest.fixture(autouse=True)
def _undrawn(undrawn: None) -> None:
    """No figures."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with its tokenizer; saving it makes every test start from the same weights."""
    torch.manual_seed(0)
    spec = CausalLM(None, ARCHITECTURE, 320)
    model = spec.load(NoAdapter(), Precision("32-true"), corpus=data("demonstration", 200).texts)
    path = tmp_path_factory.mktemp("model")
    model.save(path)
    return path


@cache
def _read(folder: Path, lora: bool) -> tuple[LanguageModel, torch.Tensor]:
    """The model of ``folder``, and the state of torch's generator once it was read."""
    torch.manual_seed(1)
    adapter = LoRA(rank=4, alpha=8.0) if lora else NoAdapter()
    return CausalLM(str(folder), None, None).load(adapter, Precision("32-true")), torch.get_rng_state()


@pytest.fixture
def load(folder: Path) -> Callable[..., LanguageModel]:
    """The model of ``folder``, with LoRA if asked: a copy of its own, and the generator as after reading it."""

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
        monkeypatch.setattr(policy_gradient, "START", 8)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """An optimizer whose steps are large enough to see."""
    return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-5)


def constant(step: int, total: int) -> float:
    """No schedule."""
    return 1.0


def fit(stage: Stage, folder: Path, resume: Path | None = None, **arguments: Any) -> dict[str, float]:
    """Trains as ``rlhf.build.train`` does; gives the last metrics."""
    quiet()
    warnings.filterwarnings("ignore", category=FutureWarning)
    stage.run_folder = folder
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


S = TypeVar("S", bound=Sampler)


def dies(sampler: S, batches: int) -> S:
    """The sampler, killed when it is asked for one batch more than these."""
    sample, asked = sampler.sample, itertools.count(1)

    def until_killed(*arguments: Any, **named: Any) -> Any:
        if next(asked) > batches:
            raise KeyboardInterrupt
        return sample(*arguments, **named)

    sampler.sample = until_killed  # type: ignore[method-assign]
    return sampler


def weights(stage: Stage) -> dict[str, torch.Tensor]:
    """All parameters of a stage, detached."""
    return {name: value.detach().clone() for name, value in stage.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
