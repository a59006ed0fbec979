from pathlib import Path

import pytest

from rlhf.data.chat_templates import CHATML_TEMPLATE
from rlhf.data.testbed.world import Testbed
from rlhf.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def world():
    return Testbed()


@pytest.fixture(scope="session")
def tokenizer(world):
    return train_tokenizer([text.text for text in world.texts(2000, 0)], 512)


@pytest.fixture(scope="session")
def chatml(world):
    """Return a tokenizer like SmolLM2-Instruct's: ChatML with newlines, a system message, pad == end-of-turn."""
    found = train_tokenizer([text.text for text in world.texts(200, 0)], 400)
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    found.eos_token = found.pad_token = "<|im_end|>"
    default = (
        "{%- if messages[0]['role'] != 'system' -%}{{- '<|im_start|>system\nBe good.<|im_end|>\n' -}}{%- endif -%}"
    )
    found.chat_template = default + CHATML_TEMPLATE
    return found


@pytest.fixture(scope="session")
def shared_data():
    """Return the directory of real data beside the checkout, which is not part of the repository; skip without it."""
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data is not there ({folder})")
    return folder
