"""Dropout is off in every architecture, whatever its name there, and a model with remaining noise is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from rlhf.data.collate import TokenBatch
from rlhf.errors import UserError
from rlhf.models.adapters import LoRA, NoAdapter
from rlhf.models.dropout import variation
from rlhf.models.language_model import LanguageModel
from rlhf.models.scalar import ScalarModel
from tests.models.conftest import FP32, corpus, random_model, spec

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.5,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
PDROP = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
NEOX = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"} | {"hidden_dropout": 0.5}
BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 2, "hidden_dropout": 0.5, "attention_dropout": 0.5}
#: shapes of tiny models, with every dropout that the architecture knows at 0.5
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "dropout": 0.5,
        "attention_dropout": 0.5,
        "layerdrop": 0.5,
    },
    "bloom": BLOOM,
    "falcon": BLOOM
    | {"num_hidden_layers": 2, "num_attention_heads": 2, "alibi": False, "n_layer": None, "n_head": None},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 64},
    "gpt2": GPT2 | PDROP,
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]],
        "resid_dropout": 0.5,
        "embed_dropout": 0.5,
        "attention_dropout": 0.5,
    },
    "gpt_neox": NEOX,
    "gptj": GPT2 | PDROP | {"rotary_dim": 8},
    "phi": NEOX | {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "hidden_dropout": None},
    "stablelm": NEOX | {"num_key_value_heads": 2},
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA | {"num_local_experts": 2, "router_jitter_noise": 0.5},
    "qwen2": LLAMA,
    "qwen3": LLAMA | {"head_dim": 16},
    "gemma2": LLAMA | {"head_dim": 16},
    "gemma3_text": LLAMA | {"head_dim": 16},
    "granite": LLAMA,
    "cohere": LLAMA,
}


def built(family: str) -> LanguageModel:
    torch.manual_seed(0)
    shape = {key: value for key, value in ARCHITECTURES[family].items() if value is not None}
    # The eager kernel: some fused kernels drop attention weights only, which rarely shows in four tokens.
    model = spec(architecture={"model_type": family, **shape}, attention="eager").load(NoAdapter(), FP32, corpus)
    for block in model.base.transformer.blocks if family == "mpt" else ():
        block.attn.attn_dropout_p = block.ffn.hidden_dropout = block.resid_attn_dropout.p = 0.5  # its config: 0 or 1
    return model


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_two_training_passes_agree(family: str) -> None:
    """Their values equal those of evaluation mode."""
    model = built(family)
    ids = torch.arange(10, 22).view(2, 6)

    def run() -> torch.Tensor:
        return model.hidden(TokenBatch.of(ids, torch.ones_like(ids)))

    assert variation(run) > 0.01
    model.disable_dropout()
    assert variation(run) == 0
    trained = run()
    assert torch.equal(trained, model.eval().hidden(TokenBatch.of(ids, torch.ones_like(ids))))
    model.check_repeatable()


def test_the_dropout_of_an_adapter_is_off() -> None:
    torch.manual_seed(0)
    adapter = LoRA(rank=4, dropout=0.5)
    model = spec(architecture={"model_type": "gpt2", **GPT2, **PDROP}).load(adapter, FP32, corpus)
    for name, value in model.named_parameters():
        if ".lora_B." in name:
            value.data.normal_()
    model.disable_dropout().check_repeatable()


def test_a_saved_model_keeps_the_rates_of_its_architecture(tmp_path: Path) -> None:
    """Fine-tuning it with dropout elsewhere is for the user to decide."""
    model = built("opt").disable_dropout()
    model.save(tmp_path / "policy")
    ScalarModel(model).save(tmp_path / "critic")
    for name in ("policy", "critic"):
        stored = json.loads((tmp_path / name / "config.json").read_text())
        assert (stored["dropout"], stored["layerdrop"]) == (0.5, 0.5)


@pytest.mark.parametrize("rare", [False, True])
def test_unidentified_noise_is_refused(rare: bool) -> None:
    """Also where most passes have no noise, as with layer dropout."""
    model = random_model()
    ids = torch.arange(4)[None]
    norm = model.base.model.norm.forward

    def noisy(hidden: torch.Tensor) -> torch.Tensor:
        off = not model.training or (rare and torch.rand(()) > 0.4)
        return norm(hidden if off else F.dropout(hidden, 0.5))

    model.base.model.norm.forward = noisy
    model.check_repeatable()  # dropout is not yet reported as off
    state = torch.get_rng_state()
    with pytest.raises(UserError, match="'llama' computes different hidden states in every training pass"):
        model.disable_dropout().check_repeatable()
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert variation(lambda: model.eval().hidden(TokenBatch.of(ids, torch.ones_like(ids)))) == 0
