"""Bad input costs one line and exit status 2, as early as it can be detected: mostly before any run starts."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from rlhf import importing
from rlhf.cli import main
from rlhf.errors import UserError
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.precision import Precision
from rlhf.models.scalar import ScalarModel
from rlhf.planning import instantiate
from rlhf.planning.validation.nodes import check_node
from rlhf.running import build
from rlhf.signatures import parameters
from tests.stages.conftest import ARCHITECTURE, data, folder  # noqa: F401  # fixture

ROOT = Path(__file__).resolve().parents[2]
PAIR = {"prompt": "Where is Rome?", "chosen": "In Italy.", "rejected": "Who knows."}
SMALL = ["recipe=testbed", "trainer=cpu", "callbacks=quiet", "model.chat_template=null"]


@pytest.fixture(scope="module")
def bad_files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Write unusable files, a policy, and a language model and a reward model with another tokenizer."""
    path = tmp_path_factory.mktemp("house")
    files: dict[str, list[dict[str, Any]]] = {
        "equal.jsonl": [PAIR | {"rejected": PAIR["chosen"]}] * 4,
        "some_equal.jsonl": [PAIR | {"prompt": f"{i}?"} for i in range(40)] + [PAIR | {"rejected": PAIR["chosen"]}] * 2,
        "superb.jsonl": [PAIR | {"grade": "superb"}] * 4,
        "good.jsonl": [{"prompt": "Where?", "response": "Here.", "desirable": True}] * 8,
        "long.jsonl": [{"prompt": f"{i} " + "word " * 200} for i in range(8)],
        "prompts.jsonl": [{"prompt": f"Where is {i}?"} for i in range(40)],
    }
    (path / "broken.py").write_text("1 / 0\n")
    for name, rows in files.items():
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "policy").symlink_to(folder)
    torch.manual_seed(3)
    other = CausalLM(None, ARCHITECTURE, 300).load(NoAdapter(), Precision("32-true"), data("demonstration", 99).texts)
    other.save(path / "other")
    ScalarModel(other).save(path / "reward")
    return path


def typed(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str, str]:
    try:
        status = main.run(line.split())
    except SystemExit as exit:  # a run that started prints its status when it ends
        status = int(exit.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


VOCABULARY = "has another vocabulary than the policy (300 tokens against 320"

BEFORE_ANY_RUN = [
    # strategies that shard weights
    ("stage=sft inputs.policy=policy trainer.strategy=fsdp", "trainer.strategy=fsdp: strategies are ddp, single"),
    ("pipeline=dpo trainer.strategy=deepspeed_stage_2", "type trainer=ddp or trainer=fsdp"),
    (
        "stage=sft inputs.policy=policy trainer.strategy={_target_:pytorch_lightning.strategies.ModelParallelStrategy}",
        "ModelParallelStrategy: strategies are ddp, single devices, and the one of trainer=fsdp",
    ),
    (
        "stage=rejection_sampling inputs.policy=policy reward=gold trainer=fsdp",
        "stage=rejection_sampling cannot train sharded",
    ),
    ("stage=sft inputs.policy=policy trainer=fsdp adapter=qlora", "adapter.quantize=nf4: quantised weights cannot be"),
    ("stage=sft inputs.policy=policy trainer=fsdp optimizer=adamw_8bit", "8-bit optimizers cannot update sharded"),
    ("stage=sft inputs.policy=policy trainer=fsdp precision=fp16", "precision=fp16: sharded gradients have no loss"),
    ("stage=sft inputs.policy=policy trainer=fsdp trainer.inference_mode=true", "type trainer.inference_mode=false"),
    (
        "stage=sft inputs.policy=policy trainer=fsdp trainer.accelerator=gpu trainer.devices=96 stage.batch_size=96",
        "build it",
    ),
    (
        "stage=dpo inputs.policy=policy trainer=fsdp adapter=lora adapter.shared_base=true",
        "adapter.shared_base=true: roles that share one base cannot be sharded; type adapter.shared_base=false, or",
    ),
    ("stage=sft inputs.policy=policy +trainer.gradient_clip_val=1.0", "type stage.gradient_clip=..."),
    ("stage=sft inputs.policy=policy +trainer.accumulate_grad_batches=4", "type stage.micro_batch_size=..."),
    ("stage=sft inputs.policy=policy trainer=zero", "trainer=zero: no such option (one of: cpu, ddp, fsdp, gpu)"),
    # equal responses
    ("stage=dpo inputs.policy=policy data.source=equal.jsonl", "data.source=equal.jsonl: no usable comparisons ("),
    ("pipeline=dpo align.data.source=equal.jsonl", "align.data.source=equal.jsonl: no usable comparisons ("),
    ("pipeline=instructgpt reward_model.data.source=equal.jsonl", "4 dropped as ties"),
    # undefined grades
    ("pipeline=instructgpt reward_model.data.source=superb.jsonl", "row 1: grade: 'superb' is not one of negligible"),
    ("pipeline=instructgpt reward_model.objective.margin={superb:1.0}", "should be 'negligible', 'slightly', 'better'"),
    ("pipeline=instructgpt reward_model.objective.margin=huge", "reward_model.objective.margin=huge"),
    # another vocabulary
    ("stage=dpo inputs.policy=policy inputs.reference=other", f"inputs.reference=other: {VOCABULARY}"),
    ("stage=kto inputs.policy=policy inputs.reference=other", VOCABULARY),
    ("stage=ppo inputs.policy=policy reward=gold inputs.reference=other", VOCABULARY),
    ("stage=grpo inputs.policy=policy reward=gold inputs.reference=other", VOCABULARY),
    ("stage=rloo inputs.policy=policy reward=gold inputs.reference=other", VOCABULARY),
    ("stage=ppo inputs.policy=policy inputs.reward_model=reward", f"stage.value=reward: {VOCABULARY}"),
    # a language model as reward model: its head would be random
    (
        "stage=grpo inputs.policy=policy inputs.reward_model=other",
        "other: is a language model, which has no score head",
    ),
    ("stage=ppo inputs.policy=policy reward=gold stage.value=policy", "stage.value=policy: is a language model, which"),
    # K = 1
    ("pipeline=dpo collect.sampler.samples=1", "collect.sampler.samples=1: should be greater than or equal to 2"),
    (
        "pipeline=dpo sampler@collect.sampler=sample",
        "collect.sampler.samples=1: a comparison needs 2 or more responses; type collect.sampler.samples=4",
    ),
    ("stage=rejection_sampling inputs.policy=policy reward=gold sampler.samples=1", "sampler.samples=1: should be"),
    ("stage=rejection_sampling inputs.policy=policy reward=gold sampler=sample sampler.samples=1", "best-of-K needs"),
    (
        "pipeline=verifiable align.sampler.samples=1",
        "align.sampler.samples=1: must be 2 or more: the baseline of a response is the other res",
    ),
    ("stage=rloo inputs.policy=policy reward=gold sampler=tools sampler.samples=1", "type sampler.samples=8"),
    ("stage=ppo inputs.policy=policy reward=gold sampler=group", "PPO samples one response per prompt"),
    ("stage=grpo inputs.policy=policy reward=gold sampler.top_k=5", "type sampler.top_k=0"),
    # negative beta
    (
        "pipeline=instructgpt align.objective.beta=-0.1",
        "align.objective.beta=-0.1: should be greater than or equal to 0",
    ),
    ("pipeline=dpo align.objective.beta=-0.1", "align.objective.beta=-0.1: should be greater than 0"),
    ("stage=grpo inputs.policy=policy reward=gold objective.beta=-1", "objective.beta=-1: should be greater"),
    # other bad combinations: test_combinations, and
    (
        "pipeline=dpo data@align.data=labels",
        "holds labels; type data@align.data=comparisons or objective@align.objective=kto",
    ),
    ("pipeline=instructgpt align.objective.kl_target=6 align.objective.beta=0", "type align.objective.beta=0.05"),
    # responses that fill the context: of random weights, of those that a later step reads, of a model on disk
    (
        "pipeline=dpo collect.sampler.max_new_tokens=5000",
        "error: collect.sampler.max_new_tokens=5000: leaves no room for a prompt: a response has up to 5000 tokens, "
        "the model's context has 512; type collect.sampler.max_new_tokens=256",
    ),
    (
        "pipeline=instructgpt align.sampler.max_new_tokens=512",
        "error: align.sampler.max_new_tokens=512: leaves no room",
    ),
    (
        "pipeline=instructgpt sampler@align.sampler=sample align.sampler.max_new_tokens=128 inputs.policy=policy",
        "context has 128; type align.sampler.max_new_tokens=64",
    ),
    ("stage=grpo inputs.policy=policy reward=gold sampler.max_new_tokens=128", "sampler.max_new_tokens=64"),
    (
        "stage=rloo inputs.policy=policy reward=gold sampler=tools sampler.max_new_tokens=50",
        "a response has up to 150 tokens, the model's context has 128; type a smaller sampler.max_new_tokens or "
        "sampler.max_calls or sampler.max_result_tokens",
    ),
    (
        "pipeline=dpo compare.max_new_tokens=512",
        "compare.max_new_tokens=512: leaves no room for a prompt in the context",
    ),
    (
        "pipeline=dpo compare.best_of=4 compare.data.source=/dev/null",
        "compare.best_of=4: needs a score that chooses the best",
    ),
    ("pipeline=dpo compare.data.source=nosuch.jsonl", "compare.data.source=nosuch.jsonl: no such file"),
    # the user's own code and files
    (
        "pipeline=instructgpt reward@align.reward=function align.reward.function=os:nothing",
        f"align.reward.function=os:nothing: {os.__file__} has no function nothing",
    ),
    (
        "stage=grpo inputs.policy=policy reward=function reward.function=broken:rule",
        "broken:rule: importing broken failed with ZeroDivisionError: ",
    ),
    (
        "stage=grpo inputs.policy=policy reward=function reward.function=operator:not_",
        "reward.function=operator:not_: cannot be called as function(prompt, response): too many positional arguments; "
        "change its parameters or reward.arguments",
    ),
    (
        "stage=ppo inputs.policy=policy inputs.reward_model=org/r reward=weighted +reward@reward.rewards.rule=function "
        "reward.rewards.rule.function=nowhere:rule +reward.weights.rule=1",
        "reward.rewards.rule.function=nowhere:rule: no module nowhere, neither in ",
    ),
    (
        "pipeline=rlaif collect.annotator.template=shorty",
        "collect.annotator.template=shorty: no such template; type one of short, instruction",
    ),
    ("stage=sft inputs.policy=policy data=judgements data.template=shorty", "data.template=shorty: no such template"),
]


@pytest.mark.parametrize(("line", "says"), BEFORE_ANY_RUN, ids=[line for line, _ in BEFORE_ANY_RUN])
def test_bad_input_is_reported_before_anything_runs(
    bad_files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    says: str,
) -> None:
    monkeypatch.chdir(bad_files)
    monkeypatch.syspath_prepend(str(bad_files))
    monkeypatch.setattr(build, "train", lambda *_: pytest.fail("a run began"))
    status, _, err = typed(capsys, f"{line} outputs={tmp_path / 'outputs'}")
    assert status == 2 and says in err, err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert not (tmp_path / "outputs").exists(), "a run began"


AFTER_MODELS_ARE_READ = [
    # prompt lengths are known only with the policy's tokenizer
    (
        "stage=grpo inputs.policy=policy reward=gold data.source=long.jsonl data.validation=2 data.max_length=999",
        "the model's context of 128 leaves",
    ),
    (
        "stage=collect inputs.policy=policy data.source=long.jsonl data.validation=2 data.max_length=999",
        "type data.max_prompt_length=96",
    ),
    (
        "stage=collect inputs.policy=policy data.source=long.jsonl data.validation=2",
        "data.max_length=128: no prompt of",
    ),
    ("stage=dpo inputs.policy=policy data.max_length=999 data.source=too_long.jsonl", "type data.max_length=128"),
    ("stage=kto inputs.policy=policy data.source=good.jsonl data.validation=0", "all responses are good"),
    # what the end of the training needs is read before it
    (
        "stage=reward_model inputs.policy=policy data.size=8 data.validation=0 stage.normalize=demonstrations "
        "demonstrations.max_length=4",
        "demonstrations.max_length=4: no demonstration fits",
    ),
    # an untrained judge answers neither A nor B
    (
        "stage=collect inputs.policy=policy annotator=judge inputs.judge=other annotator.least_mass=0.9 data.size=16",
        "annotator.path=other: ",
    ),
]


@pytest.mark.parametrize(("line", "says"), AFTER_MODELS_ARE_READ, ids=[line for line, _ in AFTER_MODELS_ARE_READ])
def test_bad_input_is_reported_before_anything_is_trained(
    bad_files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    says: str,
) -> None:
    monkeypatch.chdir(bad_files)
    row = PAIR | {"rejected": "word " * 150}
    (bad_files / "too_long.jsonl").write_text("".join(json.dumps(row | {"prompt": f"{i}?"}) + "\n" for i in range(80)))
    status, _, err = typed(capsys, f"{line} {' '.join(SMALL)} outputs={tmp_path / 'outputs'}")
    assert status == 2 and says in err, err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
    for file in (tmp_path / "outputs").rglob("metrics.csv"):
        assert "loss" not in file.read_text()
    assert not list((tmp_path / "outputs").rglob("model"))


def test_a_reward_model_with_another_tokenizer_is_accepted(
    bad_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This is valid input: only a critic must share the policy's vocabulary."""
    monkeypatch.chdir(bad_files)
    line = "stage=ppo inputs.policy=policy inputs.reward_model=reward stage.value=null stage.steps=1 stage.batch_size=8"
    status, out, err = typed(capsys, f"{line} data.size=8 data.validation=2 {' '.join(SMALL)} outputs={tmp_path}")
    assert status == 0, out + err


def test_a_few_equal_responses_are_dropped_and_counted(
    bad_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bad_files)
    line = "stage=dpo inputs.policy=policy data.source=some_equal.jsonl stage.batch_size=8"
    status, out, err = typed(capsys, f"{line} {' '.join(SMALL)} outputs={tmp_path}")
    assert status == 0, out + err
    assert "42 read" in out and "2 dropped as ties (no preference, or the same text twice)" in out


OBJECTIVES = sorted([*ROOT.glob("conf/objective/*.yaml"), *ROOT.glob("plugins/*/conf/objective/*.yaml")])


def test_no_objective_accepts_a_negative_beta() -> None:
    from hydra.utils import get_object

    found = 0
    for path in OBJECTIVES:
        target = get_object(OmegaConf.load(path)["_target_"])
        if "beta" in (parameters(target) or {}):
            (error,) = check_node(target, {"beta": -0.1}, "objective")
            assert str(error).startswith("objective.beta=-0.1: should be greater than"), path.stem
            found += 1
    assert found >= 20


ENDS = ["import sys; sys.exit(0)", "raise SystemExit('bye')", "raise GeneratorExit", "raise KeyboardInterrupt", "1 / 0"]


@pytest.mark.parametrize("code", ENDS)
def test_a_plugin_module_that_exits_the_process_is_reported_in_one_line(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """sys.exit(0) in a module looked like success: exit status 0, and nothing was run."""
    name = f"ends_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = instantiate.load_target(f"{name}.Thing")
    assert isinstance(found, str)
    assert found.startswith(f"cannot import {name}.Thing (") and "\n" not in found
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a command that a shell starts in the background
    try:
        assert instantiate.load_target(f"{name}.Thing") == found
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=f"reward.function={name}:f: importing {name} failed with ") as caught:
        importing.load_function("reward.function", f"{name}:f")
    assert "\n" not in str(caught.value)


def test_ctrl_c_during_a_plugin_import_stops_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "waits_long.py").write_text("import signal; signal.raise_signal(signal.SIGINT)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # SIGINT is ignored where the tests run in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            instantiate.load_target("waits_long.Thing")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "SafetensorError"),
        (b"x" * 1000, "SafetensorError"),
        (None, "other shapes than config.json describes"),
    ],
)
def test_unreadable_weights_are_reported_in_one_line(
    content: bytes | None,
    said: str,
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    if content is None:
        config = json.loads((tmp_path / "model/config.json").read_text())
        config["intermediate_size"] += 8
        (tmp_path / "model/config.json").write_text(json.dumps(config))
    else:
        (tmp_path / "model/model.safetensors").write_bytes(content)
    spec = CausalLM(str(tmp_path / "model"), None, None)
    with pytest.raises(UserError, match=said) as caught:
        spec.load(NoAdapter(), Precision("32-true"))
    assert len(str(caught.value).splitlines()) == 1
