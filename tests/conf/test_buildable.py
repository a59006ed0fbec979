"""Models and Trainers that cannot be built are detected while a step is planned."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf.cli import words
from rlhf.data.time_limit import time_limit
from rlhf.errors import UserError
from rlhf.planning.checks import buildable
from rlhf.storage.yaml_size import check as check_yaml

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
MODEL = {"_target_": "rlhf.models.causal_lm.CausalLM", "path": None}
TRAINER = {"_target_": "pytorch_lightning.Trainer", "accelerator": "cpu", "devices": 1}


def check_buildable(architecture: dict | None = None, trainer: dict | None = None, path: str | None = None) -> None:
    config = {"model": {**MODEL, "path": path, "architecture": architecture}, "trainer": trainer}
    buildable.check(SimpleNamespace(config=config))


def test_buildable_models_and_trainers_pass() -> None:
    check_buildable(TINY, TRAINER)
    check_buildable({**TINY, "model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hidden_size": 33}, "model.architecture: transformers cannot build it"),
        ({"hidden_size": 0}, "model.architecture.hidden_size=0: should be a whole number from 1"),
        ({"num_key_value_heads": 3}, "model.architecture: transformers cannot build it"),
        ({"num_hidden_layers": -1}, "model.architecture.num_hidden_layers=-1: should be a whole number"),
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers=1000000: should be a whole number from 1 to 1024"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0"),
        ({"hidden_act": "nosuch"}, "nosuch"),
        ({"model_type": [1]}, "model_type is [1], not a string"),
    ],
)
def test_an_architecture_that_cannot_be_built_is_refused(changed: dict, said: str) -> None:
    with pytest.raises(UserError) as error:
        check_buildable(TINY | changed)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ['{"peft_type": "LORA", "base', "[1]", '{"base_model_name_or_path": 5}'])
@pytest.mark.parametrize("place", ["m", "m/model"])
def test_a_damaged_adapter_is_named(content: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(place).mkdir(parents=True)
    Path(place, "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match=f"^{place}/adapter_config.json: "):
        check_buildable(path="m")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "config.json is not a JSON object"),
        ("", "config.json is not a JSON object"),
        ("[1]", "config.json is not a JSON object"),
        (b"\xff\xfe{", "config.json is not a JSON object"),
        (
            json.dumps({"model_type": "llama", **TINY, "hidden_act": "nosuch"}),
            "transformers cannot build the model of its config.json",
        ),
        (json.dumps({"model_type": "llama", **TINY, "num_hidden_layers": 10**6}), "config.json has num_hidden_layers="),
        (json.dumps({"model_type": "llama", **TINY, "pad_token_id": 5000}), None),
        (json.dumps({"model_type": [1], **TINY}), "model_type is [1], not a string"),
        (json.dumps({"model_type": "of_its_own", "auto_map": {}}), None),
    ],
)
def test_a_config_json_that_cannot_be_built_is_refused(tmp_path: Path, content: str | bytes, said: str | None) -> None:
    (tmp_path / "config.json").write_bytes(content.encode() if isinstance(content, str) else content)
    if said is None:
        check_buildable(path=str(tmp_path))
        return
    with pytest.raises(UserError) as error:
        check_buildable(path=str(tmp_path))
    assert said in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"devices": -1}, "trainer.devices=-1: must be a whole number from 1, or auto; type trainer.devices=1"),
        ({"devices": "abc"}, "trainer.devices=abc: must be a whole number"),
        ({"limit_val_batches": -1}, "trainer: Lightning cannot build it"),
        ({"max_steps": -5}, "trainer: Lightning cannot build it"),
        ({"accelerator": "nosuch"}, "trainer: Lightning cannot build it"),
    ],
)
def test_a_trainer_that_cannot_be_built_is_refused(changed: dict, said: str) -> None:
    with pytest.raises(UserError) as error:
        check_buildable(None, TRAINER | changed)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        "--foo",
        "stage=sft --bar",
        "-x",
        "stage=sft =5",
        "stage=sft @x=1",
        "stage=sft --package=x",
        "stage=sft --cfg nosuch",
    ],
)
def test_invalid_overrides_are_refused(line: str) -> None:
    with pytest.raises(UserError):
        words.check(line.split())


@pytest.mark.parametrize(
    "line",
    [
        "stage=sft +trainer.profiler=simple ++a.b=1 ~logger -m --cfg job -p optimizer",
        "stage@align=dpo objective@align.objective=ipo hydra.launcher.n_jobs=2 --multirun --dry-run",
        "collect_safety_2.sampler.samples=3 data.source=[a,b] -c job",
    ],
)
def test_valid_overrides_and_flags_are_accepted(line: str) -> None:
    words.check(line.split())


def test_nested_yaml_aliases_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [" + ",".join("x" * 9) + "]"]
    lines += [f"a{i}: &a{i} [" + ",".join([f"*a{i - 1}"] * 9) + "]" for i in range(1, 9)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    (tmp_path / "fine.yaml").write_text("a: &a [1, 2]\nb: *a\n")
    (tmp_path / "itself.yaml").write_text("a: &a [*a]\n")
    check_yaml(tmp_path / "fine.yaml")
    for name in ("bomb.yaml", "itself.yaml"):
        with pytest.raises(UserError, match="aliases"):
            check_yaml(tmp_path / name)


def test_time_limit_stops_an_endless_loop() -> None:
    with pytest.raises(UserError, match="endless"), time_limit(0.05, UserError("endless")):
        while True:  # the limit is on CPU time
            pass
