"""Stages on a shared base: the same losses and weights as with a base for every role, resumed and saved as before."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from rlhf.data.collate import TokenBatch
from rlhf.data.data import Data
from rlhf.errors import RunFailed, UserError
from rlhf.models import auxiliary_models, shared_base
from rlhf.models.adapters import LoRA, NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.footprint import measure_footprint
from rlhf.models.precision import Precision
from rlhf.models.scalar import ScalarModel
from rlhf.models.shared_base import SharedBase
from rlhf.planning.plan import plan
from rlhf.reward.model import ModelReward
from rlhf.running.build import build_stage
from rlhf.runs.run_directory import Run
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.stage.base import Stage
from rlhf.storage.metrics_file import read_rows
from rlhf.testing import compose_config
from rlhf_dpo.objective import DPO
from rlhf_dpo.stage import DPOStage
from rlhf_grpo.objective import GRPO
from rlhf_grpo.stage import GRPOStage
from rlhf_ppo.objective import PPO
from rlhf_ppo.stage import PPOStage

from .conftest import adamw, constant, data, fit, same, weights
from .test_exactness import Stop

FP32 = Precision("32-true")
COMMON = (adamw, constant)
LORA = LoRA(rank=4, alpha=8.0, shared_base=True)


class Runs(NamedTuple):
    """Paths of runs: pre <- sft and pre <- scorer, all but the first trained with LoRA."""

    pre: str
    sft: str
    scorer: str


def moved(model: nn.Module) -> None:
    torch.manual_seed(1)
    for name, value in model.named_parameters():
        if ".lora_B." in name:
            value.data += 0.1 * torch.randn_like(value)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("outputs")
    torch.manual_seed(0)
    architecture = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    pre = CausalLM(None, architecture, 320).load(NoAdapter(), FP32, corpus=data("demonstration", 200).texts)
    pre.save(root / "pre" / "model")
    sft = CausalLM(str(root / "pre"), None, None).load(LoRA(rank=2), FP32)
    scorer = ScalarModel.load(root / "pre", LoRA(rank=2))
    for name, model in {"sft": sft, "scorer": scorer}.items():
        moved(model)
        model.save(root / name / "model")
    return Runs(*(str(root / name / "model") for name in Runs._fields))


def made(name: str, runs: Runs, **hyperparameters: Any) -> Stage:
    """Build a stage all of whose models share ``pre``."""
    torch.manual_seed(2)
    others = {"reward.path": runs.scorer} if name != "dpo" else {}
    named = {"value": runs.scorer} if name == "ppo" else {}
    if name != "ppo":  # a separate reference
        named["reference"] = runs.pre
    others |= {f"stage.{key}": path for key, path in named.items()}
    base = SharedBase.find(CausalLM(runs.sft, None, None), LORA, FP32, others, ["stage.value"]).load()
    assert base.path == runs.pre
    reward = ModelReward(runs.scorer).load(base)
    model = base.policy()
    hyperparameters = named | hyperparameters
    if name == "ppo":
        small = {"batch_size": 8, "steps": 3, "minibatches": 2, "text_length": 32}
        return PPOStage(
            model, PPO(), data("prompt"), None, reward, AncestralSampler(8), *COMMON, **{**small, **hyperparameters}
        )
    if name == "grpo":
        small = {"batch_size": 4, "steps": 3, "text_length": 32}
        return GRPOStage(
            model,
            GRPO(),
            data("prompt"),
            None,
            reward,
            AncestralSampler(8, samples=4),
            *COMMON,
            **small,
            **hyperparameters,
        )
    return DPOStage(model, DPO(), data("comparison"), *COMMON, batch_size=8, **hyperparameters)


def rows(folder: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.endswith("_s")} for row in read_rows(folder / "metrics.csv")]


@pytest.mark.parametrize("name", ["ppo", "grpo", "dpo"])
def test_sharing_changes_no_bit(name: str, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same set-up with a copy of the base for every role gives the same bits."""
    shared = made(name, runs)
    fit(shared, tmp_path / "shared")
    copying = lambda module: shared_base.copy.deepcopy(module)  # noqa: E731
    monkeypatch.setattr(shared_base, "copy_tree", copying)
    monkeypatch.setattr(auxiliary_models, "copy_tree", copying)
    copies = made(name, runs)
    held = measure_footprint(copies.roles())
    assert held.held > 0.9 * held.copies
    fit(copies, tmp_path / "copies")
    ours, theirs = ({k: v for k, v in weights(s).items() if ".default." in k or "head" in k} for s in (shared, copies))
    assert same(ours, theirs) and len(ours) > 20
    assert rows(tmp_path / "shared") == rows(tmp_path / "copies")


def test_ppo_equals_that_of_merged_models_with_fresh_adapters(runs: Runs, tmp_path: Path, monkeypatch) -> None:
    """Compared with different weights: the merged models, each loaded separately with a new LoRA adapter."""
    shared = made("ppo", runs)
    fit(shared, tmp_path / "shared", limit_train_batches=2)
    torch.manual_seed(2)
    reward = ModelReward(runs.scorer).load()
    model = CausalLM(runs.sft, None, None).load(LoRA(rank=4, alpha=8.0), FP32)
    critic = ScalarModel.load(runs.scorer, LoRA(rank=4, alpha=8.0))
    monkeypatch.setattr("rlhf_ppo.stage.load_critic", lambda *_: critic)
    small = {"batch_size": 8, "steps": 3, "minibatches": 2, "text_length": 32}
    alone = PPOStage(model, PPO(), data("prompt"), None, reward, AncestralSampler(8), *COMMON, **small)
    fit(alone, tmp_path / "alone", limit_train_batches=2)
    for ours, theirs in zip(rows(tmp_path / "shared"), rows(tmp_path / "alone"), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(
                float(theirs[key]), float(value), atol=1e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
            )
    trained = {name: value for name, value in weights(alone).items() if ".default." in name}
    for name, value in trained.items():
        torch.testing.assert_close(weights(shared)[name], value, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_a_killed_run_on_a_shared_base_resumes_bit_for_bit(runs: Runs, tmp_path: Path) -> None:
    whole = made("ppo", runs)
    fit(whole, tmp_path / "whole")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(made("ppo", runs), tmp_path / "killed", callbacks=[Stop(2, tmp_path / "killed")])
    checkpoint = next((tmp_path / "killed").rglob("*.ckpt"))
    kept = torch.load(checkpoint, weights_only=False)["state_dict"]
    assert not any("embed_tokens" in name or "base_layer" in name for name in kept)  # frozen weights are not saved
    resumed = made("ppo", runs)
    fit(resumed, tmp_path / "killed", resume=checkpoint)
    assert same(weights(resumed), weights(whole))


def test_only_adapters_and_heads_are_trained_and_saved_in_the_usual_form(runs: Runs, tmp_path: Path) -> None:
    stage = made("ppo", runs)
    before = weights(stage)
    stage.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    optimizer = stage.configure_optimizers()
    assert optimizer is not None
    given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = {name for name, parameter in stage.named_parameters() if id(parameter) in given}
    assert trained == {name for name in before if ".default." in name or name == "critic.head.weight"}
    fit(stage, tmp_path / "fit", limit_train_batches=1)
    assert {name for name, value in weights(stage).items() if not torch.equal(value, before[name])} == trained
    stage.save(tmp_path / "run" / "model")
    ids = torch.arange(40).view(2, 20) + 10
    mask = torch.ones_like(ids)
    again = CausalLM(str(tmp_path / "run"), None, None).load(NoAdapter(), FP32)
    torch.testing.assert_close(
        again.hidden(TokenBatch.of(ids, mask)), stage.policy.hidden(TokenBatch.of(ids, mask)), atol=1e-4, rtol=1e-4
    )
    critic = ScalarModel.load(tmp_path / "run" / "critic")
    torch.testing.assert_close(
        critic.values(TokenBatch.of(ids, mask)), stage.critic.values(TokenBatch.of(ids, mask)), atol=1e-4, rtol=1e-4
    )
    adapters = [
        (tmp_path / "run" / name / "adapter_model.safetensors").read_bytes() for name in ("adapter", "critic/adapter")
    ]
    assert adapters[0] != adapters[1]


def test_a_trained_parameter_without_a_gradient_stops_the_run(runs: Runs, tmp_path: Path) -> None:
    """A kernel that cuts the graph would train nothing, without an error."""
    stage = made("ppo", runs)
    stage.critic.register_parameter("forgotten", nn.Parameter(torch.zeros(2)))
    with pytest.raises(RunFailed, match="1 trainable parameters have no gradient in the first step, such as forgotten"):
        fit(stage, tmp_path)


# -- from the command line ------------------------------------------------------------------------------------------

SMALL = (
    "recipe=testbed",
    "data.size=24",
    "data.validation=4",
    "stage.batch_size=8",
    "adapter.rank=4",
)


def composed(runs: Runs, *more: str, stage: str = "ppo") -> Any:
    given = (f"stage={stage}", f"inputs.policy={runs.sft}", f"inputs.reward_model={runs.scorer}", "adapter=lora")
    return compose_config(*given, "adapter.shared_base=true", *SMALL, *more)


def test_the_config_enables_the_shared_base(runs: Runs, tmp_path: Path) -> None:
    stage = build_stage(composed(runs), tmp_path)
    held = measure_footprint(stage.roles())
    assert set(held.roles) == {"policy", "reference", "reward", "value"}
    assert held.held < 0.6 * held.copies and held.roles["reference"][1] == 0
    fresh = build_stage(composed(runs, "stage.value=null"), tmp_path)  # a critic from the policy's own weights
    assert measure_footprint(fresh.roles()).held < 0.6 * measure_footprint(fresh.roles()).copies
    assert fresh.critic.head.weight.abs().max() == 0
    collect = build_stage(composed(runs, "annotator=reward", stage="collect"), tmp_path)
    assert collect.annotator.reward.model.language_model.shared is collect.policy.shared
    again = build_stage(composed(runs, f"inputs.base={runs.pre}", stage="rejection_sampling"), tmp_path)
    sampler = again.sampling_policy()  # the SFT model samples, the pretrained one is trained anew
    read, own = measure_footprint({"policy": again.policy, "sampler": sampler}).roles["sampler"]
    assert sampler is not again.policy and own < 0.2 * read


def test_models_that_cannot_share_a_base_are_refused_before_anything_is_read(
    runs: Runs, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(CausalLM, "load_base", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr(Data, "load", lambda *_: pytest.fail("data was read"))
    whole = ScalarModel.load(runs.pre)
    whole.save(tmp_path / "whole" / "model")
    with pytest.raises(UserError, match=r"^stage.value=.*: is not an adapter on.*type adapter.shared_base=false$"):
        build_stage(composed(runs, f"inputs.value={tmp_path / 'whole' / 'model'}"), tmp_path)
    with pytest.raises(UserError, match=r"^reward.path=.*: is not an adapter on .*; train it with LoRA"):
        build_stage(composed(runs, f"inputs.reward_model={tmp_path / 'whole' / 'model'}", "stage.value=null"), tmp_path)


# -- before anything runs -------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CausalLM, "load_base", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr(Data, "load", lambda *_: pytest.fail("data was read"))


def test_a_plan_refuses_models_that_share_no_base(runs: Runs, tmp_path: Path, nothing_read: None) -> None:
    ScalarModel.load(runs.pre).save(tmp_path / "whole" / "model")
    outputs = f"outputs={tmp_path / 'outputs'}"
    (step,) = plan(composed(runs, outputs)).steps
    assert step.stage == "ppo"
    with pytest.raises(UserError, match=r"^stage.value=.*: is not an adapter on.*type adapter.shared_base=false$"):
        plan(composed(runs, outputs, f"inputs.value={tmp_path / 'whole' / 'model'}"))
    with pytest.raises(UserError, match=r"magnitude of DoRA.*; use LoRA for both adapters \(here adapter=lora\)"):
        plan(composed(runs, outputs, "adapter=dora"))
    with pytest.raises(UserError, match="trainer.strategy=fsdp"):
        plan(composed(runs, outputs, "trainer.strategy=fsdp"))
    # The error names a reward within another part by the key that is typed for it.
    collecting = composed(
        runs, outputs, "annotator=reward", f"inputs.reward_model={tmp_path / 'whole' / 'model'}", stage="collect"
    )
    with pytest.raises(UserError, match=r"^annotator.reward.path=.*: is not an adapter on"):
        plan(collecting)


def test_the_base_of_a_finished_run_is_not_checked(runs: Runs, tmp_path: Path, nothing_read: None) -> None:
    shutil.copytree(Path(runs.pre).parents[1], tmp_path / "outputs")
    moved = Runs(*(str(tmp_path / "outputs" / name / "model") for name in Runs._fields))
    asked = composed(moved, f"outputs={tmp_path / 'outputs'}")
    (step,) = plan(asked).steps
    for adapter in (moved.sft, moved.scorer):
        file = Path(adapter).parent / "adapter" / "base.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "path": moved.pre, "relative": "../pre/model"}))
    shutil.rmtree(moved.pre)
    with pytest.raises(UserError, match="which no longer exists; restore that model"):
        plan(asked)
    Run(step.folder).begin(step.config, {}, "rlhf")
    Run(step.folder).write_status("finished")
    assert [one.folder for one in plan(asked).steps] == [step.folder]


def test_a_pipeline_predicts_the_bases_of_its_models(runs: Runs, tmp_path: Path, nothing_read: None) -> None:
    def planned(*more: str) -> list[str]:
        outputs = f"outputs={tmp_path / 'outputs'}"
        return [step.name for step in plan(compose_config("pipeline=instructgpt", outputs, *more)).steps]

    shared = ("adapter=lora", "adapter.shared_base=true")
    names = planned(*shared)
    assert names[-1] == "align" and "sft" in names
    with pytest.raises(UserError, match=r"^align: .*/reward_model/.*/adapter: the magnitude of DoRA.*adapter=lora"):
        planned("adapter=dora", "adapter.shared_base=true")
    # The reward model of another pipeline, whose base this policy will not share.
    with pytest.raises(UserError, match=r"^align.stage.value=.*: is not an adapter on the policy's base .*/sft/"):
        planned(*shared, f"align.inputs.reward_model={runs.scorer}")
    with pytest.raises(UserError, match=r"^align.stage.value=.*all of its weights were trained"):
        planned(*shared, "+adapter@reward_model.adapter=none")


# -- several ranks ----------------------------------------------------------------------------------------------------

TWO = {"devices": 2, "strategy": "ddp_fork", "limit_val_batches": 0}


def trained(stage: Stage) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights(stage).items() if ".default." in name or "head" in name}


def test_two_ranks_train_the_same_weights_as_one(runs: Runs, tmp_path: Path) -> None:
    before = trained(made("dpo", runs))
    one, two = made("dpo", runs), made("dpo", runs)
    fit(one, tmp_path / "one", limit_val_batches=0)
    fit(two, tmp_path / "two", **TWO)
    assert not same(trained(one), before)
    for name, value in trained(one).items():
        torch.testing.assert_close(trained(two)[name], value, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_sharing_changes_no_bit_on_two_ranks(runs: Runs, tmp_path: Path, monkeypatch) -> None:
    """Each rank draws its own numbers, so PPO on two ranks is compared with two that have a base for every role."""
    shared = made("ppo", runs, steps=1)
    fit(shared, tmp_path / "shared", **TWO)
    copying = lambda module: shared_base.copy.deepcopy(module)  # noqa: E731
    monkeypatch.setattr(shared_base, "copy_tree", copying)
    monkeypatch.setattr(auxiliary_models, "copy_tree", copying)
    copies = made("ppo", runs, steps=1)
    before = trained(copies)
    fit(copies, tmp_path / "copies", **TWO)
    assert same(trained(shared), trained(copies)) and not same(trained(shared), before)
    assert rows(tmp_path / "shared") == rows(tmp_path / "copies") and rows(tmp_path / "shared")
