"""Two ranks under FSDP2 end with the weights and the metrics of one process on the same batches, and resume."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from rlhf.callbacks.checkpoints import Checkpoints, latest
from rlhf.errors import UserError
from rlhf.models.adapters import LoRA, NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.language_model import LanguageModel
from rlhf.models.precision import Precision
from rlhf.objective import CrossEntropy
from rlhf.stage.base import Stage
from rlhf.stage.sharded_strategy import ShardedStrategy
from rlhf.storage import checkpoint_files
from rlhf.storage.metrics_file import read_rows
from rlhf_dpo.objective import DPO
from rlhf_dpo.stage import DPOStage
from rlhf_grpo.objective import GRPO
from rlhf_grpo.stage import GRPOStage
from rlhf_ppo.objective import PPO
from rlhf_ppo.stage import PPOStage
from rlhf_rloo.objective import RLOO
from rlhf_rloo.stage import RLOOStage
from rlhf_sft.stage import SFTStage

from .conftest import adamw, constant, data, fit, same
from .ranks import run_two_ranks
from .test_processes import ByPrompt, Partly, groups, one_text, reward_model, sgd

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("whole_start")]


def sft(load: Callable) -> Stage:
    """Build SFT on packed rows, with 13 held-out rows: 7 on one rank, in two batches, and 6 on the other."""
    numbers = {"epochs": 1, "batch_size": 6, "micro_batch_size": 1, "packing": 96}
    return SFTStage(load(), CrossEntropy(), data("demonstration", 32, 13), sgd, constant, **numbers)


def dpo(load: Callable, lora: bool = False) -> Stage:
    split = data("comparison", 16, 5)
    return DPOStage(load(lora), DPO(), split, sgd, constant, batch_size=8, micro_batch_size=3)


def ppo(load: Callable, steps: int = 1, optimizer: Any = sgd) -> Stage:
    """Build PPO of critic, reference, pretraining term and EMA, whose ranks end sampling at different steps."""
    parts = data("prompt", 16, 5), one_text(), Partly(idle=False), ByPrompt(6), optimizer, constant
    numbers = {"batch_size": 4, "epochs": 2, "minibatches": 1, "micro_batch_size": 1, "text_length": 64}
    return PPOStage(load(), PPO(gamma=0.5), *parts, steps=steps, ema_decay=0.5, **numbers)


def resampling(load: Callable) -> Stage:
    """Build GRPO with dynamic sampling, in which ranks differ in their number of attempts."""
    return groups(GRPOStage, load, GRPO(), epochs=1, max_resamples=2)


STAGES: dict[str, Callable[[Callable], Stage]] = {
    "sft": sft,
    "dpo": dpo,
    "lora": partial(dpo, lora=True),
    "reward_model": reward_model,
    "ppo": ppo,
    "grpo": lambda load: groups(
        GRPOStage, load, GRPO(scale="batch", drop_zero_spread=True), epochs=1, micro_batch_size=3
    ),
    "rloo": lambda load: groups(RLOOStage, load, RLOO(normalize=True), epochs=1),
}
SHARDED = {"devices": 2, "inference_mode": False}


def trained(stage: Stage, folder: Path, **arguments: Any) -> dict[str, Any]:
    """Train a stage; return the results of this rank, and those of the run on the first one."""
    metrics = fit(stage, folder, **arguments)
    if not stage.trainer.is_global_zero:
        return {"metrics": metrics}
    stage.save(folder / "model")
    stage.write_samples(2)
    rows = read_rows(folder / "metrics.csv")
    found = {path.relative_to(folder): load_file(path) for path in sorted(folder.glob("**/*.safetensors"))}
    weights = {f"{path} {name}": value for path, tensors in found.items() for name, value in tensors.items()}
    return {"metrics": metrics, "weights": weights, "rows": rows}


def clipped(rank: int) -> tuple[float, list[float]]:
    """Clip a gradient of (3, 4), of which each rank has one number, to norm 1 as a stage does; return norm and part."""
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(DTensor.from_local(torch.zeros(1), mesh, [Shard(0)]))
    weight.grad = DTensor.from_local(torch.tensor([3.0 + rank]), mesh, [Shard(0)])
    stage: Any = SimpleNamespace(gradient_clip=1.0, trainer=SimpleNamespace(precision_plugin=None))
    Stage.on_before_optimizer_step(stage, torch.optim.SGD([weight], lr=1.0))
    return stage._norm.item(), weight.grad.to_local().tolist()


def resumed(rank: int, load: Callable, folder: Path) -> dict[str, Any]:
    """Train three rollouts with a checkpoint after each of two; resume with the later one damaged."""
    stage = partial(ppo, load, steps=3, optimizer=adamw)
    saving = {"callbacks": [Checkpoints(every_n_batches=1, keep=2)], "enable_checkpointing": True}
    whole = trained(stage(), folder, strategy=ShardedStrategy(), **SHARDED, **saving)
    dist.barrier()
    if rank == 0:
        damaged = checkpoint_files.place(folder, 2) / "rank=1.ckpt"
        damaged.write_bytes(damaged.read_bytes()[:-1])
    dist.barrier()
    checkpoint = latest(folder)
    again = trained(stage(), folder / "again", resume=checkpoint, strategy=ShardedStrategy(), **SHARDED)
    return {"whole": whole, "again": again, "checkpoint": str(checkpoint)}


def work(rank: int, load: Callable, folder: Path) -> None:
    """Train every stage on one rank, one after the other; then a run that is resumed."""
    for name, make in STAGES.items():
        result = trained(make(load), folder / name, strategy=ShardedStrategy(), **SHARDED)
        torch.save(result, folder / f"{name}.{rank}")
    torch.save(
        trained(resampling(load), folder / "resampling", strategy=ShardedStrategy(), **SHARDED),
        folder / f"resampling.{rank}",
    )
    torch.save(clipped(rank), folder / f"clipped.{rank}")
    torch.save(resumed(rank, load, folder / "resumed"), folder / f"resumed.{rank}")


def make_loader(folder: Path) -> Callable[..., LanguageModel]:
    def load(lora: bool = False) -> LanguageModel:
        torch.manual_seed(1)
        adapter = LoRA(rank=4, alpha=8.0) if lora else NoAdapter()
        return CausalLM(str(folder), None, None).load(adapter, Precision("32-true"))

    return load


@pytest.fixture(scope="module")
def both(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the results of two ranks trained together, once for all tests."""
    target = tmp_path_factory.mktemp("both")
    load = make_loader(folder)
    load(lora=True)  # imports PEFT here, and not in both ranks
    run_two_ranks(work, load, target)
    return target


@pytest.mark.parametrize("name", STAGES)
def test_two_sharded_ranks_train_the_same_model_as_one(name, folder, both, tmp_path):
    first, second = (torch.load(both / f"{name}.{rank}") for rank in (0, 1))
    one = trained(STAGES[name](make_loader(folder)), tmp_path)
    assert first["metrics"] == second["metrics"]
    assert one["weights"].keys() == first["weights"].keys()
    for key, value in one["weights"].items():
        torch.testing.assert_close(first["weights"][key], value, atol=1e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
    # A spread over validation is a mean of batches' spreads, and two ranks have other batches.
    exact = [key for key in one["metrics"] if not re.fullmatch(r"val/.*(_std|_correlation)", key)]
    assert one["metrics"].keys() == first["metrics"].keys()
    expected = {key: one["metrics"][key] for key in exact}
    assert {key: first["metrics"][key] for key in exact} == pytest.approx(expected, abs=1e-4, rel=1e-4)


def test_the_gradient_is_clipped_by_its_norm_over_all_shards(both):
    found = [torch.load(both / f"clipped.{rank}") for rank in (0, 1)]
    assert [norm for norm, _ in found] == pytest.approx([5.0, 5.0])
    assert [part for _, [part] in found] == pytest.approx([0.6, 0.8])  # (3, 4) / 5


def test_a_sharded_run_resumes_bit_for_bit_from_the_newest_whole_checkpoint(both):
    first = torch.load(both / "resumed.0")
    assert first["checkpoint"].endswith("step=00000001.ckpt")
    whole, again = first["whole"], first["again"]
    assert same(whole["weights"], {key: again["weights"][key] for key in whole["weights"]})
    assert whole["metrics"] == again["metrics"]
    names = {path.name for path in checkpoint_files.place(both / "resumed", 1).iterdir()}
    assert names == {"rank=0.ckpt", "rank=1.ckpt", "manifest.json"}


def test_ranks_that_resample_groups_make_the_same_updates(both):
    first, second = (torch.load(both / f"resampling.{rank}") for rank in (0, 1))
    assert first["metrics"] == second["metrics"] and first["metrics"]["resampled"] > 0


def test_a_checkpoint_of_other_ranks_is_refused(both):
    with pytest.raises(UserError, match="holds the shards of 2 ranks and the run has 1; type trainer.devices=2"):
        ShardedStrategy().load_checkpoint(checkpoint_files.place(both / "resumed", 1))
