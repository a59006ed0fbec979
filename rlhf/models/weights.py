"""Weights of language models: where ``CausalLM`` gets them from, and the real ones, read from files or random."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import UserError, key
from rlhf.models.adapters import NoAdapter, merge_adapter, missing_weights_error
from rlhf.models.lineage import COPY_ADAPTER_AGAIN
from rlhf.models.load_errors import check_index, check_loaded, convert_read_errors, defer_transformers_log
from rlhf.models.machine_memory import read_machine_memory
from rlhf.models.model_source import ModelSource
from rlhf.models.precision import Precision
from rlhf.models.tokenizer_loading import check_new_tokens


class WeightSource(Protocol):
    """Source of the weights of every model that is loaded while it is in use (``use_weights``)."""

    def load(
        self,
        source: ModelSource,
        kind: Any,
        adapter: NoAdapter,
        precision: Precision,
        tokenizer: PreTrainedTokenizerBase,
    ) -> PreTrainedModel:
        """Return the model of a source with its weights, quantised if the adapter asks for it, without the adapter.

        Args:
            source: Source of the model.
            kind: Auto class of transformers that selects the model's class, such as ``AutoModelForCausalLM``.
            adapter: Adapter that will be trained on top.
            precision: Format of the weights.
            tokenizer: Tokenizer of the model, whose added tokens get rows in the embedding.
        """
        ...


class RealWeights:
    """Weights with values: read from a directory, a hub id or a GGUF file, or random if the source has no path."""

    def load(
        self,
        source: ModelSource,
        kind: Any,
        adapter: NoAdapter,
        precision: Precision,
        tokenizer: PreTrainedTokenizerBase,
    ) -> PreTrainedModel:
        """Return the model with its weights; stored adapters of the source are merged into them.

        Raises:
            UserError: If the weights cannot be read, quantised or held by this machine.
        """
        if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
            precision.check("cpu")
        adapter.check_installed()
        quantization_config = adapter.quantization_config(precision)
        arguments: dict[str, Any] = {"dtype": precision.weights, "attn_implementation": source.attention}
        if source.path is None:
            config = source.config(tokenizer)
            if quantization_config is not None:
                raise missing_weights_error()
            _check_memory(source, config, precision.weights.itemsize)
            random: PreTrainedModel = source.build(kind.from_config, config, **arguments)
            return random

        arguments["trust_remote_code"] = source.trust_remote_code
        path, adapters = source.base_path, source.adapters
        if type(adapter) is not NoAdapter:
            check_new_tokens(source, tokenizer)
        size = precision.weights.itemsize
        if quantization_config is not None:
            if adapters:
                raise UserError(
                    "is an adapter, which cannot be merged into a quantised base",
                    fix=f"type {key('model.path', 'DIRECTORY')} of the merged model, or "
                    f"{key('adapter.shared_base', 'true')} if the stage can add its own adapter to this one",
                    option="model.path",
                    value=source.path,
                )
            size = 1
            quantization_config.llm_int8_skip_modules = ["lm_head", "score"]
            arguments["quantization_config"] = quantization_config
            arguments["device_map"] = {"": _device()}
        _check_memory(source, source.config(), size)
        model = _read(source, kind, path, **arguments)
        for one in adapters:
            from peft import PeftModel  # imported late: it takes seconds

            with convert_read_errors(source.path, COPY_ADAPTER_AGAIN, "model.path", part=f"adapter {one}"):
                on_top = PeftModel.from_pretrained(model, str(one))
            model = merge_adapter(on_top, one).requires_grad_(True)  # PEFT froze the base weights
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
        return model


_current: ContextVar[WeightSource] = ContextVar("weights")


def current_weights() -> WeightSource:
    """Return the source of the weights of models that are loaded now; ``RealWeights`` unless another one is in use."""
    return _current.get(RealWeights())


@contextmanager
def use_weights(weights: WeightSource) -> Iterator[None]:
    """Load all models inside the context with weights from this source; threads started inside do not inherit it."""
    token = _current.set(weights)
    try:
        yield
    finally:
        _current.reset(token)


def _read(source: ModelSource, kind: Any, path: str, **arguments: Any) -> PreTrainedModel:
    """Call ``from_pretrained``; raise if weights are missing from the files or would be left out."""
    check_index(path)
    with defer_transformers_log():
        model, report = source.read(kind.from_pretrained, path, output_loading_info=True, **arguments)
        check_loaded(model, report, path, "model.path")
    return model


def _check_memory(source: ModelSource, config: PreTrainedConfig, bytes_per_weight: int) -> None:
    """Raise UserError before allocation if this machine cannot hold the weights; GPU machines are not checked."""
    if torch.cuda.is_available():
        return
    with convert_read_errors(source.path, option="model.path"):
        model = source.build_on_meta(config)
    need = sum(parameter.numel() for parameter in model.parameters()) * bytes_per_weight
    have = read_machine_memory()
    if need > have:
        raise UserError(
            f"the weights alone take {need / 2**30:.0f} GiB, and this machine has {have / 2**30:.0f} GiB",
            fix=f"type a smaller {key('model', '...')}, {key('precision', 'bf16_true')} or {key('adapter', 'qlora')}",
        )


def _device() -> str:
    """Return the device of quantised weights: quantising on the device itself avoids a copy of the full weights."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
