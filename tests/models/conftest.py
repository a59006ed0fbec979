"""Llama with a trained tokenizer, small enough for unit tests, in memory and as a directory."""

from pathlib import Path

import pytest
import torch

from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.language_model import LanguageModel
from rlhf.models.precision import Precision

ARCHITECTURE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
FP32 = Precision("32-true")


def corpus() -> list[str]:
    """Return enough text for a few merges."""
    return ["The capital of France is Paris.", "The river of Egypt is the Nile."] * 4


def spec(path: str | Path | None = None, **changes: object) -> CausalLM:
    """Return conf/model as a Python object."""
    arguments = {"path": str(path) if path else None, "architecture": ARCHITECTURE, "vocab_size": 300, **changes}
    return CausalLM(**arguments)  # type: ignore[arg-type]


def random_model(**changes: object) -> LanguageModel:
    """Return a model with random weights, large enough that logits differ well."""
    torch.manual_seed(0)
    architecture = {**ARCHITECTURE, "initializer_range": 0.2, **changes}
    return spec(architecture=architecture).load(NoAdapter(), FP32, corpus)


def move_adapter(model: torch.nn.Module, by: float = 0.05) -> None:
    """Move an adapter that starts at zero, as training would."""
    torch.manual_seed(1)
    for name, value in model.named_parameters():
        if ".lora_B." in name or "magnitude" in name:
            value.data += by * torch.randn_like(value)


@pytest.fixture
def model() -> LanguageModel:
    return random_model()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the same model, saved."""
    folder = tmp_path_factory.mktemp("run") / "model"
    random_model().save(folder)
    return folder


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, attention mask and loss mask, [3, 10], right-padded."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(6, 260, (3, 10), generator=generator)
    mask = torch.arange(10) < torch.tensor([10, 7, 4])[:, None]
    ids = torch.where(mask, ids, 0)
    return ids, mask, mask & (torch.arange(10) >= 2)
