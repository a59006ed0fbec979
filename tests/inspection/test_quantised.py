"""Pages and the memory check with a quantised base: bitsandbytes needs values, and models without weights have none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from rlhf.cli import main
from rlhf.errors import UserError
from rlhf.inspection.composing import Look, planned
from rlhf.inspection.roles import Role, roles_of
from rlhf.models.fake_tensors import Int8, Nf4
from rlhf.models.optimizer_state import state_bytes
from rlhf.planning.checks import memory as refusal
from rlhf.running.build import build_stage
from rlhf.testing import tiny_model
from tests.inspection.conftest import SMALL
from tests.inspection.test_models import held, stored
from tests.stages.conftest import fit

FORMS = [["adapter=qlora"], ["adapter=qlora", "adapter.double_quant=false"], ["adapter=qlora", "adapter.quantize=int8"]]
IDS = ["nf4", "nf4 with plain scales", "int8"]


@pytest.fixture
def policy(tmp_path: Path) -> str:
    """Return the override that starts from a small local model."""
    tiny_model(("Where does Amy live?", "Amy lives in Bath.")).save(tmp_path / "model")
    return f"model.path={tmp_path / 'model'}"


@pytest.mark.parametrize("form", [FORMS[0], FORMS[2]], ids=["nf4", "int8"])
def test_pages_of_a_quantised_base(capsys: pytest.CaptureFixture[str], policy: str, form: list[str]) -> None:
    for page, said in (("plan", "optimizer steps"), ("data", "records kept"), ("batch", "micro-batches of 8 x")):
        code = main.run(["inspect", page, "stage=sft", policy, *SMALL, *form])
        out, err = capsys.readouterr()
        assert code == 0 and said in out, out + err


def test_plan_of_a_pipeline_on_a_quantised_base(capsys: pytest.CaptureFixture[str], policy: str) -> None:
    words = ["sft.data.size=24", "collect.data.size=8", "align.data.size=16", "align.stage.batch_size=8"]
    small = [*words, "sft.data.validation=8", "sft.stage.batch_size=8", "align.stage.minibatches=2"]
    code = main.run(["inspect", "plan", "pipeline=instructgpt", policy, "adapter=qlora", *small])
    out, err = capsys.readouterr()
    assert code == 0, out + err
    assert "plan: sft -> collect -> reward_model -> align" in out
    assert {"policy", "critic", "reference", "reward"} <= set(out.split())


def bytes_of(module: torch.nn.Module) -> int:
    """Return the bytes of a real model, its quantised layers with what is needed to read them."""
    total, plain = 0, []
    for part in module.modules():
        weight = part._parameters.get("weight")  # an adapter's layer exposes its base's as a property
        if hasattr(weight, "quant_state") or hasattr(weight, "SCB"):
            total += stored(part)
            state: Any = getattr(part, "state", None)
            if getattr(weight, "SCB", None) is None and getattr(state, "SCB", None) is not None:
                total += held([state.SCB])  # where the first forward pass in 8 bits moves the scales
        else:
            plain += [*part.parameters(recurse=False), *part.buffers(recurse=False)]
    return total + held(plain)


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_bytes_equal_those_of_a_real_quantised_run(policy: str, form: list[str]) -> None:
    look = Look(planned(["stage=sft", policy, *SMALL, *form]).steps)
    step = look.steps[-1]
    told: Role
    (told,) = roles_of(look, look.stage(step))
    stage: Any = build_stage(OmegaConf.create(step.config), step.folder)
    own = stage.configure_optimizers
    made: list[torch.optim.Optimizer] = []

    def watched() -> torch.optim.Optimizer:
        made.append(own())
        return made[-1]

    stage.configure_optimizers = watched
    fit(stage, step.folder, limit_train_batches=1, limit_val_batches=0)
    trained = [value for value in stage.parameters() if value.requires_grad]
    assert told.weights == bytes_of(stage)
    assert told.trained == sum(value.numel() for value in trained)
    assert told.gradients == held(trained) and told.optimizer == state_bytes(made[0])
    # the memory check's count for the same run
    assert refusal.trained_bytes(step.config) == told.weights + told.gradients + told.optimizer
    layers = [part for part in look.policy(look.stage(step)).modules() if isinstance(part, Nf4 | Int8)]
    assert len(layers) == 14, "seven linear layers in each of two blocks"


@pytest.mark.parametrize("form", [FORMS[0], FORMS[2]], ids=["nf4", "int8"])
def test_the_memory_of_a_large_quantised_run_is_counted(
    policy: str, form: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (step,) = planned(["stage=sft", policy, *SMALL, *form]).steps
    monkeypatch.setattr(refusal, "SMALL", 0)
    monkeypatch.setattr(refusal, "CLOSE", 0)
    refusal.check_memory([step])
    need = refusal.trained_bytes(step.config)
    monkeypatch.setattr(refusal, "read_machine_memory", lambda: need - 1)
    with pytest.raises(UserError, match="sft: weights, gradients and optimizer state need"):
        refusal.check_memory([step])


def test_random_weights_are_refused_as_in_training(capsys: pytest.CaptureFixture[str]) -> None:
    code = main.run(["inspect", "plan", "stage=sft", "adapter=qlora", *SMALL])
    out, err = capsys.readouterr()
    assert code == 2 and "adapter=qlora: needs trained weights; type inputs.policy=RUN or adapter=lora" in out + err
