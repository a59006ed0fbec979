"""Stored models with damaged or inconsistent files: one line names the file, and no weight is made up."""

import json
import logging
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.errors import UserError
from rlhf.models import lineage
from rlhf.models.adapters import LoRA, NoAdapter
from rlhf.models.gguf_header import count_tensors
from rlhf.models.language_model import LanguageModel
from rlhf.models.load_errors import convert_read_errors
from rlhf.models.saved_config import is_scalar_model, read_config
from rlhf.models.scalar import SAFETY_HEAD, ScalarModel
from rlhf.models.vocabulary import lacks_template, read_vocabulary
from rlhf.using import export
from rlhf.using.named import Named
from tests.models.conftest import FP32, spec
from tests.models.test_causal_lm import write_gguf

HALF = b'{"base_model_name_or_path": "m", "path": "m'


def refusal(read: Callable[[], object], *said: str) -> None:
    with pytest.raises(UserError) as caught:
        read()
    line = str(caught.value)
    assert "\n" not in line and all(part in line for part in said), line


@pytest.mark.parametrize("layers", [0, 1])
def test_stored_layers_that_config_does_not_name_are_refused(layers: int, folder: Path, tmp_path: Path) -> None:
    """Of 2 stored layers only the first would be read, and saved as if it were the whole model."""
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"num_hidden_layers": 1 + layers}))
    read = lambda: spec(tmp_path / "model").load(NoAdapter(), FP32)  # noqa: E731
    if layers == 1:  # as many as are stored
        assert read().config.num_hidden_layers == 2
        return
    refusal(read, f"model.path={tmp_path / 'model'}: its weights have layers that", "such as model.layers.1.")


def test_surplus_layers_of_a_reward_model_are_refused(model: LanguageModel, tmp_path: Path) -> None:
    ScalarModel(model).save(tmp_path / "scores")
    config = json.loads((tmp_path / "scores/config.json").read_text())
    (tmp_path / "scores/config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    refusal(lambda: ScalarModel.load(tmp_path / "scores"), "layers that config.json does not describe")
    source = Named("scores", str(tmp_path / "scores"))
    (tmp_path / "out").mkdir()
    refusal(lambda: export._reward_model(Path(source.path), tmp_path / "out"), "layers that config.json does not")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"pad_token_id": 10**6}, "Padding_idx must be within num_embeddings"),
        ({"model_type": "bert"}, "weights are missing"),
    ],
)
def test_logs_of_transformers_about_a_refused_model_are_not_printed(
    changed: dict, said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | changed))
    refusal(lambda: spec(tmp_path / "model").load(NoAdapter(), FP32), f"model.path={tmp_path / 'model'}: ", said)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("end", ["x", [1, "x"], True])
def test_an_invalid_eos_token_id_is_detected_before_training(end: object, folder: Path, tmp_path: Path) -> None:
    """It used to be detected only when the trained model was saved."""
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    refusal(lambda: spec(tmp_path / "model").load(NoAdapter(), FP32), "generation_config.json has eos_token_id=")


def test_export_refuses_a_truncated_config(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"model_type": "lla')
    model = Named("m", str(tmp_path / "model"))
    refusal(
        lambda: export.export(model, tmp_path / "out", merge=False),
        f"{tmp_path / 'model'}/config.json: is not a JSON object",
    )


@pytest.mark.parametrize("propagate", [False, True])  # True: with CI=true in the environment
def test_logs_of_transformers_about_a_loaded_model_are_printed(
    propagate: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = logging.getLogger("transformers")
    monkeypatch.setattr(library, "propagate", propagate)
    monkeypatch.setattr(library, "handlers", [] if propagate else [caplog.handler])  # pytest reads the root logger
    caplog.set_level(logging.WARNING, "transformers")  # runs of other tests set the level to errors
    with convert_read_errors("m", option="model.path"):
        logging.getLogger("transformers.models").warning("heed this")
        assert caplog.messages == []
    assert caplog.messages == ["heed this"]


def test_weights_of_another_head_are_ignored(folder: Path, tmp_path: Path) -> None:
    """Weights of a tower or head that the class does not have are not layers of it."""
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    tower = {f"vision.layers.{i}.self_attn.q_proj.weight": torch.zeros(2, 2) for i in range(3)}
    save_file({**load_file(file), **tower, "value.weight": torch.zeros(1)}, file, {"format": "pt"})
    assert spec(tmp_path / "model").load(NoAdapter(), FP32).config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("base.json", HALF, "not JSON"),
        ("base.json", b"[]", "is not a mapping"),
        ("base.json", b'{"digest": null}', "has no path"),
        ("base.json", b'{"path": 5, "digest": null}', "path is 5, not a string"),
        ("base.json", b"\xff\xfe", "not JSON in UTF-8"),
        ("adapter_config.json", HALF, "not JSON"),
        ("adapter_config.json", b"[1]", "is not a mapping"),
        ("adapter_config.json", b'{"base_model_name_or_path": [1]}', "not a string"),
    ],
)
def test_a_damaged_adapter_is_named(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "m"}')
    (tmp_path / name).write_bytes(content)
    file = tmp_path / name
    refusal(lambda: lineage.find_base(tmp_path), f"{file}: ", said, "copy the adapter's directory again")
    refusal(lambda: export._named_base(Named("x", str(tmp_path)), tmp_path), f"{file}: ", said)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: file.write_bytes(b"x" * 99), "cannot be read (SafetensorError"),
        (lambda file: file.write_bytes(file.read_bytes()[:-40]), "cannot be read (SafetensorError"),
        (lambda file: file.unlink(), "cannot be read"),
        (
            lambda file: save_file({k.replace("layers.0", "layers.7"): v for k, v in load_file(file).items()}, file),
            "its adapter was trained on other layers than this base has",
        ),
    ],
    ids=["garbage", "cut", "missing", "other layers"],
)
def test_unreadable_weights_of_an_adapter_are_refused(
    damage: Callable[[Path], object], said: str, folder: Path, tmp_path: Path
) -> None:
    spec(folder).load(LoRA(rank=2), FP32).save_adapter(tmp_path / "adapter")
    damage(tmp_path / "adapter/adapter_model.safetensors")
    refusal(lambda: spec(tmp_path / "adapter").load(NoAdapter(), FP32), f"{tmp_path / 'adapter'}", said)


def test_a_model_with_a_merged_adapter_is_trained_in_full(folder: Path, tmp_path: Path) -> None:
    """PEFT freezes the layers below an adapter; without a new adapter, training had no parameter to train."""
    spec(folder).load(LoRA(rank=2), FP32).save_adapter(tmp_path / "adapter")
    loaded = spec(tmp_path / "adapter").load(NoAdapter(), FP32)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    with pytest.raises(UserError, match=r"adapter.modules=\[\]: names no layer; type adapter.modules="):
        spec(folder).load(LoRA(rank=2, modules=[]), FP32)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"scale": 1.0, "bi', "is not JSON"),
        (b"[]", "is not a mapping"),
        (b'{"scale": 1.0}', "has no bias"),
        (b'{"scale": "1", "bias": 0.0}', "scale is '1', not a number"),
        (b'{"scale": NaN, "bias": 0.0}', "scale is nan, not a finite number"),
        (b'{"scale": 1.0, "bias": 0.0, "log_odds": Infinity}', "log_odds is inf, not a finite number"),
        (None, "is missing, so the scale of the scores is unknown"),
    ],
)
def test_a_reward_model_without_its_scale_is_refused(
    content: bytes | None, said: str, model: LanguageModel, tmp_path: Path
) -> None:
    """A run of rlhf always writes the file; without it the scores would be those of scale 1 and bias 0."""
    stored = ScalarModel(model)
    stored.save(tmp_path / "model")
    (tmp_path / "status.json").write_text("{}")
    file = tmp_path / "model/rlhf.json"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    loaded = ScalarModel(model)
    refusal(lambda: loaded.load_heads(stored.head.weight, tmp_path / "model"), f"{file}: {said}", "reward model again")
    (tmp_path / "status.json").unlink()
    if content is None:  # a stranger's has no such file, and is what transformers reads
        loaded.load_heads(stored.head.weight, tmp_path / "model")
        assert (loaded.scale.item(), loaded.bias.item(), loaded.log_odds) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize("damage", ["garbage", "cut", "empty", "other names", "other width"])
def test_a_damaged_safety_head_is_named(damage: str, model: LanguageModel, tmp_path: Path) -> None:
    stored = ScalarModel(model)
    stored.add_safety_head().weight.data.fill_(0.5)
    stored.save(tmp_path)
    file = tmp_path / SAFETY_HEAD
    whole = file.read_bytes()
    head = ScalarModel(model)
    head.load_heads(stored.head.weight, tmp_path)
    assert head.safety_head is not None and torch.equal(head.safety_head.weight, stored.safety_head.weight)
    if damage == "other names":
        save_file({"w": torch.zeros(1, model.hidden_size)}, file)
    elif damage == "other width":
        save_file({"weight": torch.zeros(1, 3), "bias": torch.zeros(1)}, file)
    else:
        file.write_bytes({"garbage": os.urandom(99), "cut": whole[:-8], "empty": b""}[damage])
    refusal(lambda: ScalarModel(model).load_heads(stored.head.weight, tmp_path), f"{file}: cannot be read (")


@pytest.mark.parametrize("damage", ["cut", "no tensors", "a tensor missing", "a name cut", "a type unknown"])
def test_a_damaged_gguf_file_is_reported_in_one_line(
    damage: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    source, path = spec(folder).load(NoAdapter(), FP32), tmp_path / "m.gguf"
    if damage == "a tensor missing":
        state = source.base.state_dict()
        monkeypatch.setattr(
            type(source.base), "state_dict", lambda _: {k: v for k, v in state.items() if "layers.1.mlp.up" not in k}
        )
    write_gguf(gguf, source, path)
    monkeypatch.undo()
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    whole = path.read_bytes()
    at = whole.index(b"blk.1.ffn_up") if b"blk.1.ffn_up" in whole else 0
    changed = {
        "cut": whole[:-2000],
        "a tensor missing": whole,
        "no tensors": whole[:8] + bytes(8) + whole[16:],
        "a name cut": whole[:at] + b"\xff\xff" + whole[at + 2 :],
        "a type unknown": whole[: at + len("blk.1.ffn_up.weight") + 20] + b"\x77" * 4 + whole[at + 43 :],
    }
    path.write_bytes(changed[damage])
    refusal(lambda: spec(path, tokenizer=str(folder)).load(NoAdapter(), FP32), f"model.path={path}: ")
    assert not list((tmp_path / "cache").rglob("config.json")), "nothing half-read is kept for the next time"


MANY = 2**50
KEY = struct.pack("<Qc", 1, b"a")
TENSOR = struct.pack("<QcIQ", 1, b"t", 1, 8)  # name and shape


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", 9, 0, MANY),  # an array of bytes
        struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", 9, 8, MANY),  # an array of texts
        struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", 9, 9, MANY),  # an array of arrays
        struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IQ", 8, MANY),  # a long text
        struct.pack("<QQ", 0, MANY) + KEY,
        struct.pack("<QQ", MANY, 0),
        struct.pack("<QQ", 1, 0) + TENSOR + struct.pack("<IQ", 0, MANY),  # data behind the end of the file
        struct.pack("<QQ", 1, 0) + TENSOR[:-8] + struct.pack("<QIQ", MANY, 0, 0),  # a long tensor
    ],
)
def test_a_gguf_file_that_declares_more_than_it_holds_is_refused(
    header: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The readers of transformers would read 2^50 empty values from beyond the end of the file."""
    pytest.importorskip("gguf")
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(struct.pack("<4sI", b"GGUF", 3) + header + bytes(64))
    refusal(
        lambda: spec(tmp_path / "m.gguf").load(NoAdapter(), FP32), "(the file ends before the data that it declares)"
    )


@pytest.mark.parametrize("order", ["LITTLE", "BIG"])
def test_the_header_of_a_whole_gguf_file_is_walked_to_its_end(order: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian[order])
    writer.add_token_list(["a", "bc"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_custom_alignment(64)
    writer.add_tensor("whole", np.ones((4, 32), dtype=np.float32))
    blocks = gguf.quants.quantize(np.ones((2, 64), dtype=np.float32), gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert count_tensors(tmp_path / "m.gguf") == 2
    whole = (tmp_path / "m.gguf").read_bytes()
    end = gguf.GGUFReader(tmp_path / "m.gguf").tensors[-1]
    size = end.data_offset + end.n_bytes  # without the padding behind it
    (tmp_path / "m.gguf").write_bytes(whole[:size])
    assert count_tensors(tmp_path / "m.gguf") == 2
    (tmp_path / "m.gguf").write_bytes(whole[: size - 1])
    with pytest.raises(ValueError, match="ends before"):
        count_tensors(tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/other.safetensors", 5, "sub/../../other.safetensors"])
def test_an_index_that_names_weights_outside_its_directory_is_refused(
    name: object, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model/model.safetensors").rename(tmp_path / "other.safetensors")
    names = load_file(tmp_path / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    refusal(
        lambda: spec(tmp_path / "model").load(NoAdapter(), FP32),
        f"model.safetensors.index.json: names {name}, which is not inside the model's directory; get the model again",
    )


@pytest.mark.parametrize("content", [b"[]", b"{", b"", b"\xff\xfe", b"[" * 9999, b"5"])
def test_inspecting_a_directory_survives_malformed_files(content: bytes, tmp_path: Path) -> None:
    """The code that reads the files later reports what is wrong."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(content)
    assert (
        read_config(tmp_path) is None and is_scalar_model(tmp_path) is None and read_vocabulary(str(tmp_path)) is None
    )
    assert lacks_template(str(tmp_path)) is False
    (tmp_path / "config.json").write_text('{"architectures": 5}')
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": [5]}}')
    assert is_scalar_model(tmp_path) is None and read_vocabulary(str(tmp_path)) is None
