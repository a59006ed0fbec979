"""Tokens that end a response and that pad a batch."""

from transformers import PreTrainedTokenizerBase

from rlhf.data.end_tokens import end_of_turn_id
from rlhf.errors import UserError, key

PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>")


def find_end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that ends a response: the chat template's end of turn, or EOS without a template."""
    if tokenizer.chat_template:
        return end_of_turn_id(tokenizer)
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has neither a chat template nor an EOS token",
            fix=f"type {key('model.chat_template', 'chatml')}",
        )
    return int(tokenizer.eos_token_id)


def set_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Set a padding token that differs from the end of a response.

    Plain transformers find the last token by ``id != pad``.
    """
    end = find_end_id(tokenizer)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != end:
        return
    vocabulary = tokenizer.get_vocab()
    unknown = [tokenizer.unk_token] if tokenizer.unk_token else []
    for token in [*PAD_TOKENS, *unknown]:
        if vocabulary.get(token, end) != end:
            tokenizer.pad_token = token
            return
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
