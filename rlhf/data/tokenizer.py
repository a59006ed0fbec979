"""Byte-level BPE tokenizer trained on the corpus, for models that start from random weights."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rlhf.data.chat_templates import CHAT_TEMPLATE
from rlhf.data.end_tokens import END_OF_TEXT
from rlhf.errors import UserError, key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIALS = ("<|pad|>", END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer, which can encode any string, whatever the corpus contained.

    The padding token is separate, and end-of-sequence is the end of a turn (`<|end|>`).

    Args:
        texts: Training corpus.
        vocab_size: Size of the vocabulary, the 6 special tokens and the 256 bytes included; a small corpus may give
            fewer.

    Raises:
        UserError: For a vocab_size below these 262.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    least = 256 + len(SPECIALS)
    if vocab_size < least:
        raise UserError(
            f"must be at least {least} (256 bytes and {len(SPECIALS)} special tokens)",
            fix=f"type {key('model.vocab_size', least)} or more",
            option="model.vocab_size",
            value=vocab_size,
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        bos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
