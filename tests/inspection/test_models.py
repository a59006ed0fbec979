"""Parameter counts and bytes of models without weights, against the real models and optimizers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from rlhf.importing import build_option
from rlhf.inspection.composing import Look, read_examples
from rlhf.inspection.roles import roles_of
from rlhf.models.adapters import NoAdapter, QLoRA
from rlhf.models.fake_tensors import FakeWeights, quantize, sizes, use_fake_weights
from rlhf.models.optimizer_state import StateSize, state_bytes
from rlhf.models.precision import Precision
from rlhf.running.build import build_stage
from rlhf.testing import tiny_model
from tests.inspection.conftest import SMALL
from tests.stages.conftest import fit

CONF = Path(__file__).parents[2] / "conf"


def held(tensors: Any) -> int:
    """Return the bytes of distinct tensors."""
    return sum(t.numel() * t.element_size() for t in {id(tensor): tensor for tensor in tensors}.values())


@pytest.mark.parametrize(
    "words", [[], ["adapter=lora"], ["adapter=dora", "precision=bf16_true"]], ids=["whole", "lora", "dora in bf16"]
)
def test_memory_of_weights_gradients_and_optimizer_equals_that_of_a_run(
    looked: Callable[..., Look], words: list[str]
) -> None:
    look = looked("stage=sft", *SMALL, *words)
    step = look.steps[-1]
    (role,) = roles_of(look, look.stage(step))
    stage = build_stage(OmegaConf.create(step.config), step.folder)
    found: dict[str, int] = {}

    def measure(*_: Any) -> None:
        found["gradients"] = held(value.grad for value in stage.parameters() if value.grad is not None)

    own = stage.configure_optimizers

    def watched() -> torch.optim.Optimizer:
        found["optimizer"] = 0
        stage.made = own()
        stage.made.register_step_pre_hook(measure)
        return stage.made

    stage.configure_optimizers = watched
    precision = step.config["precision"]["trainer"]
    fit(stage, step.folder, limit_train_batches=1, limit_val_batches=0, precision=precision)
    assert role.parameters == sum(value.numel() for value in stage.parameters())
    assert role.trained == sum(value.numel() for value in stage.parameters() if value.requires_grad)
    assert role.weights == held([*stage.parameters(), *stage.buffers()])
    assert role.gradients == found["gradients"]
    assert role.optimizer == state_bytes(stage.made)


@pytest.mark.parametrize("file", sorted((CONF / "optimizer").glob("*.yaml")), ids=lambda file: file.stem)
def test_optimizer_state_is_counted(file: Path) -> None:
    make = build_option(OmegaConf.load(file))
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((96, 128), (64, 64), (100,), (7, 9))]
    optimizer = make(weights)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert StateSize(make).of(weights) == state_bytes(optimizer)


def test_ppo_with_an_adapter_has_no_second_base(looked: Callable[..., Look], tmp_path: Path) -> None:
    tiny_model(("Where does Amy live?", "Amy lives in Bath.")).save(tmp_path / "model")
    words = ["stage=ppo", f"inputs.policy={tmp_path / 'model'}", "reward=gold", "stage.value=null"]
    small = [*SMALL, "stage.minibatches=2"]

    def roles(*more: str) -> dict[str, Any]:
        look = looked(*words, *small, *more)
        return {role.name: role for role in roles_of(look, look.stage(look.steps[-1]))}

    whole, lora = roles(), roles("adapter=lora")
    assert set(whole) == set(lora) == {"policy", "critic", "reference"}
    assert whole["reference"].parameters == whole["policy"].parameters
    assert whole["critic"].parameters == whole["policy"].parameters + 32  # the value head
    assert lora["reference"].total == 0 and "adapter off" in lora["reference"].note
    assert lora["policy"].trained < lora["policy"].parameters / 2


def test_quantised_layers_take_the_bytes_of_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for scheme, kind in (("nf4", Linear4bit), ("int8", Linear8bitLt)):
        for nested in (True, False) if scheme == "nf4" else (None,):
            how = QLoRA(quantize=scheme, double_quant=nested).quantization_config(Precision("32-true"))
            plain = torch.nn.Sequential(torch.nn.Linear(96, 200, bias=False))
            arguments = {"compress_statistics": nested, "quant_type": "nf4"} if nested is not None else {}
            if nested is None:
                arguments = {"has_fp16_weights": False}
            real = kind(96, 200, bias=False, **arguments)
            real.load_state_dict({"weight": plain[0].weight.detach().clone()})
            real = real.to("cpu")
            if nested is not None:
                real(torch.zeros(1, 96))
            quantize(plain, how)
            assert sizes(plain, set())[2] == stored(real), (scheme, nested)


def stored(layer: Any) -> int:
    """Return the bytes of a quantised layer with everything that is needed to read it."""
    weight = layer.weight
    tensors = [weight.data]
    state = getattr(weight, "quant_state", None)
    for part in (state, getattr(state, "state2", None)):
        if part is not None:
            tensors += [part.absmax, part.code]
    if getattr(state, "offset", None) is not None:
        tensors.append(state.offset)
    if getattr(weight, "SCB", None) is not None:
        tensors.append(weight.SCB)
    return held(tensors)


def test_inspecting_70b_weights_allocates_no_memory() -> None:
    spec = build_option(OmegaConf.merge(OmegaConf.load(CONF / "model" / "llama2_70b.yaml"), {"path": None}))
    with use_fake_weights(FakeWeights()):
        tokenizer = tiny_model().tokenizer
        model = spec.load_weights(
            __import__("transformers").AutoModelForCausalLM, NoAdapter(), Precision("bf16-true"), tokenizer
        )
    count, trained, weights = sizes(model, set())
    # Llama 2 70B without its embedding and projection, both of 32000 x 8192, and with those of this small vocabulary
    rows = 2 * 8192 * len(tokenizer)
    assert count == trained == 68_976_648_192 - 2 * 32000 * 8192 + rows
    assert 2 * count <= weights < 2 * count + 2**20


def test_models_of_a_step_that_has_not_run_are_counted(looked: Callable[..., Look]) -> None:
    words = ["pretrain.data.size=64", "sft.data.size=40", "align.stage.batch_size=8", "align.data.size=16"]
    look = looked("pipeline=instructgpt", *words)
    roles = {role.name: role for role in roles_of(look, look.stage(look.steps[-1], strict=False))}
    assert set(roles) == {"policy", "critic", "reference", "reward"}
    assert roles["critic"].parameters == roles["reward"].parameters == roles["policy"].parameters + 32
    read_examples(look.stage(look.steps[1]))
    assert len(look.stage(look.steps[1]).examples) == 40
    assert not list(Path().glob("outputs/*"))
