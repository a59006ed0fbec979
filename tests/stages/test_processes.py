"""Two ranks under DDP end with the weights and the metrics of one process on the same batches.

Every rank samples with its own random numbers, so here a response's numbers are derived from its prompt.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import pytorch_lightning as pl
import torch

from rlhf.data.records import GRADES
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.language_model import LanguageModel
from rlhf.models.precision import Precision
from rlhf.reward.base import Reward
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.rollout import Rollout, joined
from rlhf.stage.base import Stage
from rlhf.storage.metrics_file import read_rows
from rlhf_dpo.objective import DPO
from rlhf_dpo.stage import DPOStage
from rlhf_grpo.objective import GRPO
from rlhf_grpo.stage import GRPOStage
from rlhf_ppo.objective import PPO
from rlhf_ppo.stage import PPOStage
from rlhf_reward_model.objective import Pairwise
from rlhf_reward_model.stage import RewardModelStage
from rlhf_rloo.objective import RLOO
from rlhf_rloo.stage import RLOOStage

from .conftest import constant, data, fit, same, weights
from .ranks import run_two_ranks

# Two ranks, all stages; each measures the start as in a run.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("whole_start")]


def sgd(parameters: Any, lr: float = 0.3) -> torch.optim.Optimizer:
    """Build SGD, whose steps are proportional to the gradient: Adam's first step would hide a wrong factor."""
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def number(text: str) -> int:
    return crc32(text.encode())


class ByPrompt(AncestralSampler):
    """Sampler with the same responses to a prompt on any rank and in any batch."""

    def sample(self, policy, prompts, seed):
        one = [super(ByPrompt, self).sample(policy, [x], number(x.messages[-1].content)) for x in prompts]
        return joined(one, policy.pad_id)


class Partly(Reward):
    """Reward of any scale; responses to some prompts score the same, so that their groups have no spread."""

    def __init__(self, idle: bool = True) -> None:
        self.idle = idle

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        scores = []
        for prompt, text in zip(rollout.prompts, rollout.texts, strict=True):
            kind = number(prompt.messages[-1].content)
            scores.append(1.0 if self.idle and kind % 2 == 0 else number(text) % 10 * (1 + kind % 5))
        return torch.tensor(scores, dtype=torch.float32)


class Passes(pl.Callback):
    """Callback that counts backward passes."""

    def __init__(self) -> None:
        self.count = 0

    def on_before_backward(self, *_: Any) -> None:
        self.count += 1


def groups(kind: type, load: Callable, objective: Any, **hyperparameters: Any) -> Stage:
    sampler = ByPrompt(6, samples=4)
    hyperparameters = {"steps": 1, "batch_size": 6, "micro_batch_size": 2, "text_length": 32, **hyperparameters}
    return kind(
        load(), objective, data("prompt", 32, 5), data("text"), Partly(), sampler, sgd, constant, **hyperparameters
    )


def one_text() -> Any:
    """Return text of a single row, because each rank draws its own rows."""
    text = data("text")
    return replace(text, train=text.train[:1])


def graded(validation: int = 6) -> Any:
    """Return comparisons whose held-out part gives each of two ranks a grade that the other lacks."""
    split = data("comparison", 16, 24)
    by_grade = {grade: [x for x in split.validation if {g for g in x.grades} == {grade}] for grade in GRADES}
    first, second = sorted(by_grade.values(), key=len)[-2:]
    both = [x for pair in zip(first, second, strict=False) for x in pair]
    assert len(both) >= validation
    return replace(split, validation=both[:validation])


def reward_model(load: Callable) -> Stage:
    """Build a reward model that is trained slowly, so that its final accuracy is below 1."""
    slow = partial(sgd, lr=0.02)
    return RewardModelStage(load(), Pairwise(), graded(), slow, constant, batch_size=8, micro_batch_size=2)


def dpo(load: Callable) -> Stage:
    split = data("comparison", 16, 5)
    return DPOStage(load(), DPO(), split, sgd, constant, batch_size=8, micro_batch_size=3)


def ppo(load: Callable) -> Stage:
    hyperparameters = {
        "steps": 1,
        "batch_size": 4,
        "epochs": 2,
        "minibatches": 1,
        "micro_batch_size": 1,
        "text_length": 64,
    }
    parts = data("prompt", 32, 5), one_text(), Partly(idle=False), ByPrompt(6), sgd, constant
    return PPOStage(load(), PPO(gamma=0.5), *parts, **hyperparameters)


STAGES: dict[str, Callable[[Callable], Stage]] = {
    "dpo": dpo,
    "reward_model": reward_model,
    "grpo": lambda load: groups(GRPOStage, load, GRPO(scale="batch", drop_zero_spread=True)),
    "rloo": lambda load: groups(RLOOStage, load, RLOO(normalize=True)),
    "ppo": ppo,
}


def trained(name: str, load: Callable, folder: Path, **arguments: Any) -> dict[str, Any]:
    """Train a stage; return its results on this rank."""
    stage, passes = STAGES[name](load), Passes()
    metrics = fit(stage, folder / name, callbacks=[passes], **arguments)
    rows = read_rows(folder / name / "metrics.csv") if stage.trainer.is_global_zero else []
    return {"weights": weights(stage), "metrics": metrics, "passes": passes.count, "rows": rows}


def work(rank: int, load: Callable, folder: Path) -> None:
    """Train every stage on one rank, one after the other."""
    for name in STAGES:
        torch.save(trained(name, load, folder, devices=2, strategy="ddp"), folder / f"{name}.{rank}")


@pytest.fixture(scope="module")
def both(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the results of two ranks trained together, once for all tests."""

    def load() -> LanguageModel:
        torch.manual_seed(1)
        return CausalLM(str(folder), None, None).load(NoAdapter(), Precision("32-true"))

    target = tmp_path_factory.mktemp("both")
    run_two_ranks(work, load, target)
    return target


@pytest.mark.parametrize("name", STAGES)
def test_two_ranks_train_the_same_weights_as_one(name, load, both, tmp_path):
    first, second = (torch.load(both / f"{name}.{rank}") for rank in (0, 1))
    one = trained(name, load, tmp_path)
    assert same(first["weights"], second["weights"]) and first["metrics"] == second["metrics"]
    moved = weights(STAGES[name](load))
    assert any((one["weights"][key] - value).abs().max() > 1e-3 for key, value in moved.items())
    for key, value in one["weights"].items():
        torch.testing.assert_close(first["weights"][key], value, atol=1e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
    # A spread over validation is a mean of batches' spreads, and two ranks have other batches.
    exact = [key for key in one["metrics"] if not re.fullmatch(r"val/.*(_std|_correlation)", key)]
    assert one["metrics"].keys() == first["metrics"].keys()
    assert {k: first["metrics"][k] for k in exact} == pytest.approx({k: one["metrics"][k] for k in exact}, abs=1e-4)
    if name == "grpo":
        assert first["passes"] != second["passes"]  # groups without spread are unevenly distributed
    if name == "reward_model":
        grades = {key for key in one["metrics"] if key.startswith("val/accuracy/")}
        assert len(grades) == 2 and len({one["metrics"][key] for key in grades}) == 2
