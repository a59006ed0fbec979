"""Sources of models, and parameter counts of the named sizes."""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from rlhf.data.collate import TokenBatch
from rlhf.errors import UserError
from rlhf.models import weights
from rlhf.models.adapters import LoRA, NoAdapter, QLoRA
from rlhf.models.causal_lm import CausalLM
from rlhf.models.fake_tensors import FakeWeights, use_fake_weights
from rlhf.models.precision import Precision
from rlhf.models.saved_config import check_file_limits
from rlhf.planning.step_config import register_resolvers
from rlhf.storage import hub
from tests.models.conftest import ARCHITECTURE, FP32, corpus, random_model, spec
from tests.models.published import COUNTS

CONF = Path(__file__).parents[2] / "conf" / "model"


def from_yaml(name: str) -> CausalLM:
    node = OmegaConf.load(CONF / f"{name}.yaml")
    node.path = None
    arguments = OmegaConf.to_container(node, resolve=True)
    assert isinstance(arguments, dict) and arguments.pop("_target_") == "rlhf.models.causal_lm.CausalLM"
    return CausalLM(**arguments)  # type: ignore[arg-type]


# Llama 2 and TinyLlama: the published counts. The rest: computed from the architecture.
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama_tiny", 918_656),
        ("llama_15m", 15_191_712),
        ("llama_110m", 109_529_856),
        ("llama_1b", 1_100_048_384),
        ("llama2_7b", 6_738_415_616),
        ("llama2_13b", 13_015_864_320),
        ("llama2_70b", 68_976_648_192),
    ],
)
def test_named_sizes_have_the_published_parameter_counts(name: str, count: int) -> None:
    made = from_yaml(name)
    assert made.parameters() == count
    assert "llama2" not in name or made.config().max_position_embeddings == 4096
    assert name != "llama2_70b" or made.config().num_key_value_heads == 8


def test_every_named_size_is_tested() -> None:
    names = {file.stem for file in CONF.glob("*.yaml")}
    assert names == {f"llama_{x}" for x in ("tiny", "15m", "110m", "1b")} | {
        "llama2_7b",
        "llama2_13b",
        "llama2_70b",
        *COUNTS,
    }


def test_random_weights_follow_the_seed_and_the_tokenizer() -> None:
    one, other = random_model(), random_model()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert one.config.vocab_size == len(one.tokenizer)
    assert one.config.pad_token_id == one.pad_id != one.end_id == one.config.eos_token_id
    assert one.context_length == 64 and one.training


def test_architecture_may_be_an_omegaconf_node() -> None:
    node = OmegaConf.create({"hidden_size": 32, "num_attention_heads": 2, "rope_parameters": {"rope_theta": 5e5}})
    config = CausalLM(path=None, architecture=node, vocab_size=300).config()  # type: ignore[arg-type]
    assert type(config.rope_parameters) is dict and config.hidden_size == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": {"hiden_size": 4}}, "model.architecture.hiden_size.*did you mean hidden_size"),
        ({"architecture": {"model_type": "lama"}}, "model_type=lama"),
        ({"path": "./nowhere"}, "model.path=./nowhere: no such directory; type the path"),
        ({"tokenizer": "./nowhere"}, "model.tokenizer=./nowhere: no such directory"),
        ({"path": "nowhere.gguf"}, "model.path=nowhere.gguf: no such file"),
        ({"chat_template": "chatml2"}, "model.chat_template=chatml2"),
        ({"architecture": None}, "model.path"),
        (
            {"architecture": {"model_type": "gemma2", "num_hidden_layers": 1}},
            "no such attention kernel; type model.attention=eager",
        ),
    ],
)
def test_invalid_model_options_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        spec(**changes).load(NoAdapter(), FP32, corpus)


def test_missing_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(UserError, match="9 weights are missing"):
        spec(tmp_path).load(NoAdapter(), FP32)


def test_random_weights_need_text_or_a_tokenizer() -> None:
    with pytest.raises(UserError, match="model.tokenizer"):
        spec().load(NoAdapter(), FP32)


def test_another_tokenizer_sets_the_vocabulary(folder: Path) -> None:
    made = spec(tokenizer=str(folder)).load(NoAdapter(), FP32)
    assert made.config.vocab_size == len(AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize(("rows", "found"), [(500, 500), (10, None)])
def test_random_weights_have_the_rows_of_their_architecture_and_of_their_tokenizer(
    rows: int, found: int | None
) -> None:
    made = spec(architecture={**ARCHITECTURE, "vocab_size": rows}).load(NoAdapter(), FP32, corpus)
    assert made.config.vocab_size == (found or len(made.tokenizer))


def test_chat_template_adds_its_tokens(folder: Path) -> None:
    made = spec(folder, chat_template="chatml").load(NoAdapter(), FP32)
    assert made.tokenizer.convert_ids_to_tokens(made.end_id) == "<|im_end|>"
    assert made.base.get_input_embeddings().num_embeddings == len(made.tokenizer)
    with pytest.raises(UserError, match="adapter=none"):
        spec(folder, chat_template="chatml").load(LoRA(), FP32)


def test_an_adapter_refuses_template_tokens_that_the_weights_never_saw(folder: Path, tmp_path: Path) -> None:
    """Also where the embedding has spare rows, as in published models: an untrained frozen row is never changed."""
    made = spec(folder).load(NoAdapter(), FP32)
    made.base.resize_token_embeddings(len(made.tokenizer) + 64)
    made.save(tmp_path / "padded")
    padded, said = tmp_path / "padded", r"<\|im_start\|>, <\|im_end\|> are new to this model, .*; type adapter=none"
    with pytest.raises(UserError, match=f"model.chat_template=chatml: {said}"):
        spec(padded, chat_template="chatml").load(LoRA(), FP32)
    whole = spec(padded, chat_template="chatml").load(NoAdapter(), FP32)
    assert whole.base.get_input_embeddings().num_embeddings == len(made.tokenizer) + 64
    whole.tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=f"model.tokenizer=.*tokenizer: {said}"):
        spec(padded, tokenizer=str(tmp_path / "tokenizer")).load(LoRA(), FP32)
    # Weights that were trained with the tokens have them in their own tokenizer.
    whole.save(tmp_path / "trained")
    for options in ({}, {"chat_template": "chatml"}, {"chat_template": "plain"}):
        spec(tmp_path / "trained", **options).load(LoRA(), FP32)


def test_padding_is_never_the_end_of_a_response(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token  # as in many published tokenizers
    tokenizer.save_pretrained(tmp_path)
    made = spec(folder, tokenizer=str(tmp_path)).load(NoAdapter(), FP32)
    assert made.pad_id != made.end_id
    assert len(made.tokenizer) == made.config.vocab_size


def test_weights_larger_than_the_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "read_machine_memory", lambda: 10**9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    architecture = {"hidden_size": 4096, "num_hidden_layers": 8}
    with pytest.raises(UserError, match="GiB"):
        spec(architecture=architecture).load(NoAdapter(), FP32, corpus)


def test_bf16_true_loads_half_the_bytes(folder: Path) -> None:
    made = spec(folder).load(NoAdapter(), Precision("bf16-true"))
    assert {value.dtype for value in made.parameters()} == {torch.bfloat16}


def test_float16_is_refused_on_a_cpu() -> None:
    with pytest.raises(UserError, match="precision=bf16"):
        Precision("16-mixed").check("cpu")
    Precision("16-mixed").check("gpu")
    Precision("bf16-mixed").check("cpu")


def test_a_gguf_file_is_loaded_and_cached(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    source = spec(folder).load(NoAdapter(), FP32)
    path = tmp_path / "tiny.gguf"
    write_gguf(gguf, source, path)
    loaded = spec(path, tokenizer=str(folder)).load(NoAdapter(), FP32)
    ids = torch.arange(10, 20)[None]
    ones = torch.ones_like(ids)
    torch.testing.assert_close(
        loaded.hidden(TokenBatch.of(ids, ones)), source.hidden(TokenBatch.of(ids, ones)), atol=1e-5, rtol=1e-5
    )
    loaded.save(tmp_path / "model")
    assert spec(tmp_path / "model").load(NoAdapter(), FP32).pad_id == source.pad_id
    assert "dequantised once" in capsys.readouterr().out
    # The second time it is read from the cache, and can be quantised to 4 bits.
    again = spec(path, tokenizer=str(folder)).load(QLoRA(rank=2), FP32)
    assert "dequantised" not in capsys.readouterr().out and again.adapted


@pytest.mark.parametrize("mode", [lambda: use_fake_weights(FakeWeights()), lambda: torch.device("meta"), torch.no_grad])
def test_gguf_is_converted_outside_the_modes_of_its_caller(
    mode: Callable[[], AbstractContextManager[Any]], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("gguf")
    path, source = tmp_path / "tiny.gguf", spec(folder).load(NoAdapter(), FP32)
    write_gguf(gguf, source, path)
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))  # empty, as on a new machine
    with mode():
        assert spec(path, tokenizer=str(folder)).config().vocab_size == source.config.vocab_size
    loaded = spec(path, tokenizer=str(folder)).load(NoAdapter(), FP32)
    for name, weight in source.base.state_dict().items():
        torch.testing.assert_close(loaded.base.state_dict()[name], weight, rtol=0, atol=0)


def test_an_invalid_gguf_file_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"no weights in here")
    with pytest.raises(UserError, match="broken.gguf: is not a GGUF file that transformers can read") as caught:
        spec(tmp_path / "broken.gguf", tokenizer=str(folder)).load(NoAdapter(), FP32)
    assert "\n" not in str(caught.value)


def write_gguf(gguf, source, path: Path) -> None:  # type: ignore[no-untyped-def]
    """Write a float32 Llama as GGUF, with rows of q and k permuted as llama.cpp expects them."""
    config = source.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, value in source.base.state_dict().items():
        if key == "lm_head.weight":
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
        if heads:
            value = value.view(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), value.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["llama2_70b", "llama_tiny", *COUNTS])
def test_options_compose_with_and_without_a_policy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "choose", lambda hub_id, package: hub.Choice(hub_id, f"not {package}"))
    register_resolvers()
    with initialize_config_dir(str(CONF.parent), version_base="1.3"):
        alone = instantiate(compose(f"model/{name}", overrides=["+inputs.policy=null"]).model)
        given = instantiate(compose(f"model/{name}", overrides=["+inputs.policy=outputs/sft/3f2a"]).model)
    assert given.path == "outputs/sft/3f2a"
    if name in COUNTS:
        assert alone.path == alone.hub_id == given.hub_id
        assert name != "smollm2_135m" or alone.path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    else:
        assert alone.path is None
    if name == "llama2_70b":
        assert alone.parameters() == pytest.approx(69e9, rel=0.001)  # on the meta device: no memory


@pytest.mark.parametrize(
    "shape",
    [
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": 10**12},  # a list of that many layer types does not fit into memory
        {"hidden_size": 10**9},
        {"text_config": {"num_hidden_layers": 10**6}},
        {"intermediate_size": [64, 10**9]},
    ],
)
def test_a_config_with_impossible_sizes_is_refused_by_every_reader(tmp_path: Path, shape: dict) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **shape}))
    spec = CausalLM(path=str(tmp_path), architecture=None, vocab_size=None)
    with pytest.raises(UserError, match="should be a whole number from 1 to"):
        spec.config()


def test_sizes_per_layer_are_accepted(tmp_path: Path) -> None:
    check_file_limits({"model_type": "gemma3n_text", "intermediate_size": [8192, 16384]}, "m")
