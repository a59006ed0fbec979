"""Language models by source: random weights of a named size, Hugging Face directory, hub id, GGUF file or adapter."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from rlhf.errors import UserError, key
from rlhf.models.adapters import NoAdapter
from rlhf.models.language_model import LanguageModel
from rlhf.models.model_source import ModelSource
from rlhf.models.precision import Precision
from rlhf.models.saved_config import output_count_error
from rlhf.models.special_tokens import find_end_id
from rlhf.models.tokenizer_loading import Corpus, load_tokenizer
from rlhf.models.weights import current_weights

if not sys.stderr.isatty():  # progress bars clutter a file or a pipe
    hf_logging.disable_progress_bar()


@dataclass(frozen=True)
class CausalLM(ModelSource):
    """Language model that is loaded from a source, whose arguments it has. Nothing is read before ``load``."""

    def load(self, adapter: NoAdapter, precision: Precision, corpus: Corpus | None = None) -> LanguageModel:
        """Load the model with its tokenizer and a fresh adapter.

        Args:
            adapter: Adapter that is trained on top of the weights.
            precision: Format of the weights.
            corpus: Returns the texts that a tokenizer is trained on when there is none.

        Raises:
            UserError: If the weights cannot be found or do not fit the machine, or the model has no tokenizer.
        """
        if self.scalar:
            raise UserError(
                "is a reward or value model, and a language model is needed here",
                fix=f"type {key('model.path', 'DIRECTORY_OR_HUB_ID')} of a language model",
                option="model.path",
                value=self.path,
            )
        tokenizer = self.load_tokenizer(corpus)
        model = self.load_weights(AutoModelForCausalLM, adapter, precision, tokenizer)
        language_model = self._assemble(model, tokenizer, adapter, precision, AutoModelForCausalLM)
        language_model.check_head()
        return language_model

    def load_decoder(
        self, adapter: NoAdapter, precision: Precision, corpus: Corpus | None = None
    ) -> tuple[LanguageModel, torch.Tensor | None]:
        """Load the decoder without vocabulary projection, and the [1, D] scalar head stored with it, or None."""
        tokenizer = self.load_tokenizer(corpus)
        head = None
        if self.scalar:
            kind: Any = AutoModelForSequenceClassification
            model = self.load_weights(kind, adapter, precision, tokenizer)
            if model.config.num_labels != 1:
                raise output_count_error(self.path, model.config.num_labels)
            head = model.score.weight.detach().float().clone()
        else:
            kind = AutoModel
            model = self.load_weights(kind, adapter, precision, tokenizer)
        return self._assemble(model.get_decoder(), tokenizer, adapter, precision, kind), head

    def load_base(
        self, adapter: NoAdapter, precision: Precision, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[PreTrainedModel, Callable[[Any], Callable[[], PreTrainedModel]] | None]:
        """Load the causal LM that adapters are put on, and a loader of its plain weights.

        The base is frozen and quantised by ``adapter``. The loader is None without quantisation; otherwise it takes the
        class that reads the weights, and returns a function that loads them unquantised.
        """
        model = self.load_weights(AutoModelForCausalLM, adapter, precision, tokenizer)
        adapter.prepare(model)
        model.requires_grad_(False)
        if adapter.quantization_config(precision) is None:
            return model, None
        return model, lambda kind: partial(self._plain_weights, kind, precision, tokenizer)

    def load_tokenizer(self, corpus: Corpus | None = None) -> PreTrainedTokenizerBase:
        """Load the tokenizer alone, with its padding token and chat template."""
        return load_tokenizer(self, corpus)

    def load_weights(
        self, kind: Any, adapter: NoAdapter, precision: Precision, tokenizer: PreTrainedTokenizerBase
    ) -> PreTrainedModel:
        """Load the model without adapter from the weight source in use; see ``WeightSource.load``."""
        return current_weights().load(self, kind, adapter, precision, tokenizer)

    def parameters(self) -> int:
        """Return the number of weights without allocating any; tied weights count once."""
        return sum(parameter.numel() for parameter in self.build_on_meta().parameters())

    def _assemble(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        adapter: NoAdapter,
        precision: Precision,
        kind: Any,
    ) -> LanguageModel:
        plain = None
        if adapter.quantization_config(precision) is not None:
            plain = partial(self._plain_weights, kind, precision, tokenizer)
        language_model = LanguageModel(adapter.apply(model), tokenizer, find_end_id(tokenizer), plain, self.folder)
        language_model.adapter, language_model.precision, language_model.spec = adapter, precision, self
        language_model.enable_padding_free()
        if self.gradient_checkpointing:
            language_model.gradient_checkpointing(int(self.gradient_checkpointing))
        return language_model.train()  # from_pretrained returns a model in eval mode

    def _plain_weights(self, kind: Any, precision: Precision, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """Load the weights without quantisation."""
        model = self.load_weights(kind, NoAdapter(), precision, tokenizer)
        return model if kind is AutoModelForCausalLM else model.get_decoder()
