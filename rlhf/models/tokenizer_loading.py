"""Tokenizers of language models: trained on a corpus or loaded, with a padding token and a chat template."""

import dataclasses
from collections.abc import Callable, Iterable

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf.data.chat_templates import TOKENS
from rlhf.data.rendering import control_tokens
from rlhf.data.tokenizer import train_tokenizer
from rlhf.errors import UserError, key
from rlhf.models.model_source import ModelSource
from rlhf.models.special_tokens import set_pad_token

Corpus = Callable[[], Iterable[str]]


def load_tokenizer(source: ModelSource, corpus: Corpus | None) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, or train one on the corpus; set its chat template and padding token.

    Raises:
        UserError: If there is neither a tokenizer nor a corpus, or the tokenizer cannot be read.
    """
    if (source.tokenizer or source.path) is None:
        if corpus is None or source.vocab_size is None:
            raise UserError(
                "the weights are random, and there is no text to train a tokenizer on",
                fix=f"type {key('model.tokenizer', 'DIRECTORY_OR_HUB_ID')}, {key('model.path', 'DIRECTORY_OR_HUB_ID')} "
                f"or {key('inputs.policy', 'RUN')}",
                option="model.tokenizer",
            )
        tokenizer: PreTrainedTokenizerBase = train_tokenizer(corpus(), source.vocab_size)
    else:
        tokenizer = load_own_tokenizer(source)
    if source.chat_template is not None:
        tokenizer.chat_template = source.read_template()
        missing = [t for t in TOKENS.get(source.chat_template, ()) if t not in tokenizer.get_vocab()]
        if missing:
            tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    set_pad_token(tokenizer)
    return tokenizer


def load_own_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer that comes with ``tokenizer`` or ``path``, with its own template and padding, if any."""
    place = source.tokenizer or source.path
    assert place is not None
    if place == source.path:
        own = source.adapters
        there = own and (own[-1] / "tokenizer_config.json").exists()
        place = str(own[-1]) if there else source.base_path
    tokenizer: PreTrainedTokenizerBase = source.read(AutoTokenizer.from_pretrained, place)
    return tokenizer


def check_new_tokens(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if the chat template writes tokens that the weights were never trained with.

    An adapter leaves the embedding frozen, so these tokens would keep their initial embeddings. Whether the embedding
    has rows for them does not matter: published models round its size up.
    """
    if source.chat_template is None and source.tokenizer is None:
        return
    try:
        known = set(load_own_tokenizer(dataclasses.replace(source, tokenizer=None, chat_template=None)).get_vocab())
    except UserError:  # weights without a tokenizer
        rows = source.config().get_text_config().vocab_size
        known = {token for token, index in tokenizer.get_vocab().items() if index < rows}
    new = [token for token in control_tokens(tokenizer).written if token not in known]
    if new:
        own = f"{key('model.chat_template', None)} {key('model.tokenizer', None)}"
        raise UserError(
            f"{', '.join(new)} are new to this model, and an adapter leaves their embeddings untrained",
            fix=f"type {key('adapter', 'none')}, or {own} (the model's own template and tokenizer)",
            option="model.chat_template" if source.chat_template else "model.tokenizer",
            value=source.chat_template or source.tokenizer,
        )
