"""Chat templates by name: Jinja files in the directory ``templates``, each with its source."""

import re
from pathlib import Path

FOLDER = Path(__file__).parent / "templates"


def _read(path: Path) -> str:
    """Return a template without the comment on its source, which saved models need not contain."""
    return re.sub(r"\{#.*?#\}\s*", "", path.read_text(encoding="utf-8"), flags=re.DOTALL).strip()


# Name, as in model.chat_template=NAME, to Jinja text.
TEMPLATES: dict[str, str] = {path.stem: _read(path) for path in sorted(FOLDER.glob("*.jinja"))}

# Special tokens that a template writes and that a tokenizer may lack. The others write its eos and bos tokens.
TOKENS: dict[str, tuple[str, ...]] = {
    "plain": ("<|pad|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}

# Template of tokenizers trained here: `<|user|>..<|end|><|assistant|>..<|end|>`, without newlines or a default system
# message.
CHAT_TEMPLATE = TEMPLATES["plain"]

# ChatML without a default system message.
CHATML_TEMPLATE = TEMPLATES["chatml"]
