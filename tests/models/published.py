"""Published models of ``conf/model``: exact counts of weights and adapted layers, and tiny models of their families."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rlhf.models.causal_lm import CausalLM

CONF = Path(__file__).parents[2] / "conf" / "model"

#: Number of weights of the published files, tied weights once.
COUNTS = {
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "qwen2_5_0_5b": 494_032_768,
    "qwen3_0_6b": 596_049_920,
    "llama3_2_1b": 1_235_814_400,
    "gemma3_270m": 268_098_176,
    "pythia_160m": 162_322_944,
    "pythia_410m": 405_334_016,
    "pythia_1b": 1_011_781_632,
    "opt_125m": 125_239_296,
}

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: Linear layers of a decoder layer, by model type.
MODULES = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma3_text": LLAMA,
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
}
#: One model of each type.
FAMILIES = {
    "llama": "llama3_2_1b",
    "qwen2": "qwen2_5_0_5b",
    "qwen3": "qwen3_0_6b",
    "gemma3_text": "gemma3_270m",
    "gpt_neox": "pythia_160m",
    "opt": "opt_125m",
}
#: Sizes of a tiny model; those that a family has no name for are left out.
TINY = {
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "vocab_size": 300,
    "sliding_window": 4,  # shorter than the rows of the tests
}


def option(name: str) -> dict[str, Any]:
    """Return the arguments of an option's constructor, with random weights."""
    node = OmegaConf.load(CONF / f"{name}.yaml")
    node.path = None
    arguments = OmegaConf.to_container(node, resolve=True)
    assert isinstance(arguments, dict) and arguments.pop("_target_") == "rlhf.models.causal_lm.CausalLM"
    return {str(key): value for key, value in arguments.items()}


def random_weights(name: str) -> CausalLM:
    """Return the option as a source of random weights."""
    return CausalLM(**option(name))


def tiny(name: str, **changes: Any) -> CausalLM:
    """Return a tiny model of the option's family, with every other setting of its architecture.

    Gemma 3 gets a layer of each kind of attention.
    """
    arguments = option(name)
    own = arguments["architecture"]
    own |= {key: value for key, value in TINY.items() if key in own}
    if own["model_type"] == "gemma3_text":
        own["layer_types"] = ["sliding_attention", "full_attention"]
    own["init_std" if own["model_type"] == "opt" else "initializer_range"] = 0.2
    return CausalLM(**arguments | {"vocab_size": 300} | changes)
