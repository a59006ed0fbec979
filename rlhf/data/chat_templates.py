"""Chat templates by name: the Jinja files beside this module. Each says where it is from."""

import re
from pathlib import Path

FOLDER = Path(__file__).parent / "templates"


def _read(path: Path) -> str:
    """The template without the comment that says where it is from, which need not go into every saved model."""
    return re.sub(r"\{#.*?#\}\s*", "", path.read_text(encoding="utf-8"), flags=re.DOTALL).strip()


TEMPLATES: dict[str, str] = {path.stem: _read(path) for path in sorted(FOLDER.glob("*.jinja"))}
"""Name, as in model.chat_template=NAME, to Jinja text."""

TOKENS: dict[str, tuple[str, ...]] = {
    "plain": ("<|pad|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
"""Special tokens that a template writes and that a tokenizer may lack. The others write its eos and bos tokens."""
