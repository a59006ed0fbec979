"""Two processes under DDP end with the weights and the metrics of one process on the same batches.

Every process samples with random numbers of its own, so here a reply's are drawn from its prompt.
"""

import multiprocessing
import os
import re
import socket
import traceback
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
from rlhf.metrics_file import read_rows
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.language_model import LanguageModel
from rlhf.models.precision import Precision
from rlhf.rollout import Rollout, Sampler, joined
from rlhf.stage import Stage
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

# Two processes, all stages; each measures the start on what a run does, in whatever process.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("whole_start")]


def sgd(parameters: Any, lr: float = 0.3) -> torch.optim.Optimizer:
    """Steps in proportion to the gradient: Adam's first would hide a wrong factor, and blow up rounding."""
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def number(text: str) -> int:
    return crc32(text.encode())


class ByPrompt(Sampler):
    """The same replies to a prompt on whatever process, and in whatever batch."""

    def sample(self, policy, prompts, seed):
        one = [super(ByPrompt, self).sample(policy, [x], number(x.messages[-1].content)) for x in prompts]
        return joined(one, policy.pad_id)


class Partly:
    """A reward of any scale; replies to some of the prompts score the same, so that their groups teach nothing."""

    def __init__(self, idle: bool = True) -> None:
        self.idle = idle

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        scores = []
        for prompt, text in zip(rollout.prompts, rollout.texts, strict=True):
            kind = number(prompt.messages[-1].content)
            scores.append(1.0 if self.idle and kind % 2 == 0 else number(text) % 10 * (1 + kind % 5))
        return torch.tensor(scores, dtype=torch.float32)


class Passes(pl.Callback):
    """Counts backward passes."""

    def __init__(self) -> None:
        self.count = 0

    def on_before_backward(self, *_: Any) -> None:
        self.count += 1


def groups(kind: type, load: Callable, objective: Any, **knobs: Any) -> Stage:
    sampler = ByPrompt(6, samples=4)
    knobs = {"steps": 1, "batch_size": 6, "micro_batch_size": 2, "text_length": 32, **knobs}
    return kind(load(), objective, data("prompt", 32, 5), data("text"), Partly(), sampler, sgd, constant, **knobs)


def one_text() -> Any:
    """Text in which every row that is drawn is the same row: each process draws rows of its own."""
    text = data("text")
    return replace(text, train=text.train[:1])


def graded(validation: int = 6) -> Any:
    """Comparisons, of which one process of two gets the held-out ones of one grade alone, and no other does."""
    split = data("comparison", 16, 24)
    by_grade = {grade: [x for x in split.validation if {g for g in x.grades} == {grade}] for grade in GRADES}
    first, second = sorted(by_grade.values(), key=len)[-2:]
    both = [x for pair in zip(first, second, strict=False) for x in pair]
    assert len(both) >= validation
    return replace(split, validation=both[:validation])


def reward_model(load: Callable) -> Stage:
    """It learns little, so that not all is right in the end."""
    slow = partial(sgd, lr=0.02)
    return RewardModelStage(load(), Pairwise(), graded(), slow, constant, batch_size=8, micro_batch_size=2)


def dpo(load: Callable) -> Stage:
    split = data("comparison", 16, 5)
    return DPOStage(load(), DPO(), split, sgd, constant, batch_size=8, micro_batch_size=3)


def ppo(load: Callable) -> Stage:
    knobs = {"steps": 1, "batch_size": 4, "epochs": 2, "minibatches": 1, "micro_batch_size": 1, "text_length": 64}
    parts = data("prompt", 32, 5), one_text(), Partly(idle=False), ByPrompt(6), sgd, constant
    return PPOStage(load(), PPO(gamma=0.5), *parts, **knobs)


STAGES: dict[str, Callable[[Callable], Stage]] = {
    "dpo": dpo,
    "reward_model": reward_model,
    "grpo": lambda load: groups(GRPOStage, load, GRPO(scale="batch", drop_zero_spread=True)),
    "rloo": lambda load: groups(RLOOStage, load, RLOO(normalize=True)),
    "ppo": ppo,
}


def trained(name: str, load: Callable, folder: Path, **arguments: Any) -> dict[str, Any]:
    """Trains; what came out of it on this process."""
    stage, passes = STAGES[name](load), Passes()
    metrics = fit(stage, folder / name, callbacks=[passes], **arguments)
    rows = read_rows(folder / name / "metrics.csv") if stage.trainer.is_global_zero else []
    return {"weights": weights(stage), "metrics": metrics, "passes": passes.count, "rows": rows}


def work(rank: int, port: int, load: Callable, folder: Path) -> None:
    """What one of the processes does: it trains every stage, one after the other."""
    status = 1
    try:
        torch.set_num_threads(1)
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": 2}
        os.environ.update({name: str(value) for name, value in where.items()})
        for name in STAGES:
            torch.save(trained(name, load, folder, devices=2, strategy="ddp"), folder / f"{name}.{rank}")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


@pytest.fixture(scope="module")
def both(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left what they found, trained together; started once for all tests."""

    def load() -> LanguageModel:
        torch.manual_seed(1)
        return CausalLM(str(folder), None, None).load(NoAdapter(), Precision("32-true"))

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    target = tmp_path_factory.mktemp("both")
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=work, args=(rank, port, load, target)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)  # they wait for each other for ever where one makes more calls than the other
    for process in started:
        if process.is_alive():
            process.kill()
    return target


@pytest.mark.parametrize("name", STAGES)
def test_two_processes_train_as_one(name, load, both, tmp_path):
    first, second = (torch.load(both / f"{name}.{rank}") for rank in (0, 1))
    one = trained(name, load, tmp_path)
    assert same(first["weights"], second["weights"]) and first["metrics"] == second["metrics"]
    moved = weights(STAGES[name](load))
    assert any((one["weights"][key] - value).abs().max() > 1e-3 for key, value in moved.items())
    for key, value in one["weights"].items():
        torch.testing.assert_close(first["weights"][key], value, atol=1e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
    # A spread over validation is a mean of batches' spreads, and two processes have other batches.
    exact = [key for key in one["metrics"] if not re.fullmatch(r"val/.*(_std|_correlation)", key)]
    assert one["metrics"].keys() == first["metrics"].keys()
    assert {k: first["metrics"][k] for k in exact} == pytest.approx({k: one["metrics"][k] for k in exact}, abs=1e-4)
    if name == "grpo":
        assert first["passes"] != second["passes"]  # groups that teach nothing are not evenly spread
    if name == "reward_model":
        grades = {key for key in one["metrics"] if key.startswith("val/accuracy/")}
        assert len(grades) == 2 and len({one["metrics"][key] for key in grades}) == 2
