"""Language models by source: random weights of a named size, Hugging Face directory, hub id, GGUF file or adapter."""

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft import PeftModel
from pydantic import Field
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from rlhf.data.chat_templates import TEMPLATES, TOKENS
from rlhf.data.end_tokens import end_of_turn_id
from rlhf.data.rendering import check_syntax, control_tokens
from rlhf.data.tokenizer import train_tokenizer
from rlhf.errors import UserError, suggest
from rlhf.models.adapters import NEEDS_WEIGHTS, NoAdapter, merged
from rlhf.models.gguf import converted
from rlhf.models.language_model import LanguageModel
from rlhf.models.lineage import COPY_ADAPTER_AGAIN, resolve_adapters
from rlhf.models.precision import Precision
from rlhf.models.reading import check_index, check_loaded, defer_transformers_log, readable
from rlhf.models.saved_config import check_file_limits, written
from rlhf.storage import hub

if not sys.stderr.isatty():  # progress bars clutter a file or a pipe
    hf_logging.disable_progress_bar()

Corpus = Callable[[], Iterable[str]]

PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>")


@dataclass(frozen=True)
class CausalLM:
    """Source of a language model. Nothing is read before ``load``.

    Args:
        path: Directory, hub id, GGUF file, PEFT adapter directory, or run directory. None: random weights.
        architecture: Arguments of the model's configuration, used when ``path`` is None; ``model_type`` selects the
            family (default llama).
        vocab_size: Vocabulary size of the byte-level BPE that is trained on the corpus when there is neither ``path``
            nor ``tokenizer``.
        tokenizer: Directory or hub id of another tokenizer. None: the model's own.
        chat_template: "plain", "chatml", "llama2", "llama3", "zephyr" or a Jinja file, replacing the tokenizer's own
            template. None: keep the tokenizer's own.
        attention: Attention kernel: "sdpa" (PyTorch's fused kernel) or "eager" (written out).
        gradient_checkpointing: Whether activations are recomputed in the backward pass to save memory.
        trust_remote_code: Whether Python code that comes with the weights may run.
    """

    path: str | None
    architecture: dict[str, Any] | None
    vocab_size: Annotated[int, Field(gt=0)] | None
    tokenizer: str | None = None
    chat_template: str | None = None
    attention: Literal["sdpa", "eager"] = "sdpa"
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.chat_template is not None:  # so that a malformed template fails now and not hours into a pipeline
            check_syntax(self._template())

    # --- loading ---

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
            raise UserError(f"model.path={self.path}: is a reward or value model, a language model is needed here")
        tokenizer = self._tokenizer(corpus)
        model = self._weights(AutoModelForCausalLM, adapter, precision, tokenizer)
        language_model = self._assemble(model, tokenizer, adapter, precision, AutoModelForCausalLM)
        language_model.check_head()
        return language_model

    def load_decoder(
        self, adapter: NoAdapter, precision: Precision, corpus: Corpus | None = None
    ) -> tuple[LanguageModel, torch.Tensor | None]:
        """Load the decoder without vocabulary projection, and the [1, D] scalar head stored with it, or None."""
        tokenizer = self._tokenizer(corpus)
        head = None
        if self.scalar:
            kind: Any = AutoModelForSequenceClassification
            model = self._weights(kind, adapter, precision, tokenizer)
            if model.config.num_labels != 1:
                raise UserError(f"model.path={self.path}: has {model.config.num_labels} outputs, a reward model has 1")
            head = model.score.weight.detach().float().clone()
        else:
            kind = AutoModel
            model = self._weights(kind, adapter, precision, tokenizer)
        return self._assemble(model.get_decoder(), tokenizer, adapter, precision, kind), head

    def parameters(self) -> int:
        """Return the number of weights without allocating any; tied weights count once."""
        return sum(parameter.numel() for parameter in self.outline().parameters())

    def outline(self) -> PreTrainedModel:
        """Build the model's layers on the meta device, without weights and without memory."""
        with torch.device("meta"):
            made: PreTrainedModel = AutoModelForCausalLM.from_config(
                self.config(), trust_remote_code=self.trust_remote_code
            )
        return made

    def config(self, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedConfig:
        """Return the model's configuration; with random weights, its vocabulary is the tokenizer's if one is given."""
        if self.path is not None:
            base = self._base_path()
            shape = written(base)
            if shape is not None:  # check before transformers builds lists with one entry per layer
                check_file_limits(shape, f"model.path={self.path}")
            found = self._found(AutoConfig.from_pretrained, base)
            check_file_limits(found.to_dict(), f"model.path={self.path}")
            return found
        if self.architecture is None:
            raise UserError("model.path: no weights given; type model.path=FOLDER_OR_HUB_ID or inputs.policy=RUN")
        arguments = _plain(self.architecture)
        family = arguments.pop("model_type", "llama")
        try:
            kind = type(AutoConfig.for_model(family))
        except ValueError as error:
            raise UserError(f"model.architecture.model_type={family}: transformers knows no such family") from error
        known = {field.name for field in dataclasses.fields(kind)}
        for name in arguments:
            if name not in known:
                raise UserError(f"model.architecture.{name}: {family} has no such setting{suggest(name, known)}")
        if tokenizer is None:
            return kind(**{"vocab_size": self.vocab_size or 32000, **arguments})
        specials = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": _end_id(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
        }
        return kind(**{**arguments, "vocab_size": len(tokenizer), **specials})

    def load_tokenizer(self, corpus: Corpus | None = None) -> PreTrainedTokenizerBase:
        """Load the tokenizer alone, with its padding token and chat template."""
        return self._tokenizer(corpus)

    def load_base(
        self, adapter: NoAdapter, precision: Precision, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[PreTrainedModel, Callable[[Any], Callable[[], PreTrainedModel]] | None]:
        """Load the causal LM that adapters are put on, and a loader of its plain weights.

        The base is frozen and quantised by ``adapter``. The loader is None without quantisation; otherwise it takes the
        class that reads the weights, and returns a function that loads them unquantised.
        """
        model = self._weights(AutoModelForCausalLM, adapter, precision, tokenizer)
        adapter.prepare(model)
        model.requires_grad_(False)
        if adapter.description(precision) is None:
            return model, None
        return model, lambda kind: partial(self._plain_weights, kind, precision, tokenizer)

    # --- parts ---

    def _assemble(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        adapter: NoAdapter,
        precision: Precision,
        kind: Any,
    ) -> LanguageModel:
        plain = None
        if adapter.description(precision) is not None:
            plain = partial(self._plain_weights, kind, precision, tokenizer)
        language_model = LanguageModel(adapter.apply(model), tokenizer, _end_id(tokenizer), plain, self.folder)
        language_model.adapter, language_model.precision, language_model.spec = adapter, precision, self
        if self.gradient_checkpointing:
            language_model.gradient_checkpointing()
        return language_model.train()  # from_pretrained returns a model in eval mode

    def _plain_weights(self, kind: Any, precision: Precision, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """Load the weights without quantisation."""
        model = self._weights(kind, NoAdapter(), precision, tokenizer)
        return model if kind is AutoModelForCausalLM else model.get_decoder()

    def _weights(
        self, kind: Any, adapter: NoAdapter, precision: Precision, tokenizer: PreTrainedTokenizerBase
    ) -> PreTrainedModel:
        if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
            precision.check("cpu")
        quantization = adapter.quantization(precision)
        arguments: dict[str, Any] = {"dtype": precision.weights, "attn_implementation": self.attention}
        if self.path is None:
            config = self.config(tokenizer)
            if quantization is not None:
                raise UserError(NEEDS_WEIGHTS)
            self._check_memory(config, precision.weights.itemsize)
            return self._made(kind.from_config, config, **arguments)

        arguments["trust_remote_code"] = self.trust_remote_code
        path, adapters = self._base_path(), self._adapters()
        if type(adapter) is not NoAdapter:
            self._check_new_tokens(tokenizer)
        size = precision.weights.itemsize
        if quantization is not None:
            if adapters:
                raise UserError(
                    f"model.path={self.path}: adapters cannot be quantised; give the merged model, or type "
                    "adapter.shared_base=true where a stage can put its own adapter on top"
                )
            size = 1
            quantization.llm_int8_skip_modules = ["lm_head", "score"]
            arguments["quantization_config"] = quantization
            arguments["device_map"] = {"": _device()}
        self._check_memory(self.config(), size)
        model = self._read(kind, path, **arguments)
        for one in adapters:
            with readable(f"model.path={self.path}: adapter {one}", COPY_ADAPTER_AGAIN):
                on_top = PeftModel.from_pretrained(model, str(one))
            model = merged(on_top, one).requires_grad_(True)  # PEFT froze the base weights
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
        return model

    def _check_new_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise UserError if the chat template writes tokens that the weights were never trained with.

        An adapter leaves the embedding frozen, so these tokens would keep their initial embeddings. Whether the
        embedding has rows for them does not matter: published models round its size up.
        """
        if self.chat_template is None and self.tokenizer is None:
            return
        try:
            known = set(dataclasses.replace(self, tokenizer=None, chat_template=None).own_tokenizer().get_vocab())
        except UserError:  # weights without a tokenizer
            rows = self.config().get_text_config().vocab_size
            known = {token for token, index in tokenizer.get_vocab().items() if index < rows}
        new = [token for token in control_tokens(tokenizer).written if token not in known]
        if new:
            option = f"chat_template={self.chat_template}" if self.chat_template else f"tokenizer={self.tokenizer}"
            raise UserError(
                f"model.{option}: {', '.join(new)} are new to this model, and a frozen embedding never learns them: "
                "type adapter=none, or keep the model's own tokenizer and template (model.chat_template=null)"
            )

    def _tokenizer(self, corpus: Corpus | None) -> PreTrainedTokenizerBase:
        source = self.tokenizer or self.path
        if source is None:
            if corpus is None or self.vocab_size is None:
                raise UserError(
                    "model.tokenizer: random weights and no text to train a tokenizer on; "
                    "type model.tokenizer=FOLDER_OR_HUB_ID, model.path=... or inputs.policy=RUN"
                )
            tokenizer: PreTrainedTokenizerBase = train_tokenizer(corpus(), self.vocab_size)
        else:
            tokenizer = self.own_tokenizer()
        if self.chat_template is not None:
            tokenizer.chat_template = self._template()
            missing = [t for t in TOKENS.get(self.chat_template, ()) if t not in tokenizer.get_vocab()]
            if missing:
                tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
        _set_pad_token(tokenizer)
        return tokenizer

    def own_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer that comes with ``tokenizer`` or ``path``, with its own template and padding, if any."""
        source = self.tokenizer or self.path
        assert source is not None
        if source == self.path:
            own = self._adapters()
            there = own and (own[-1] / "tokenizer_config.json").exists()
            source = str(own[-1]) if there else self._base_path()
        tokenizer: PreTrainedTokenizerBase = self._found(AutoTokenizer.from_pretrained, source)
        return tokenizer

    def _template(self) -> str:
        assert self.chat_template is not None
        if self.chat_template in TEMPLATES:
            return TEMPLATES[self.chat_template]
        file = Path(self.chat_template)
        if not file.is_file():
            raise UserError(
                f"model.chat_template={self.chat_template}: neither a template's name nor a Jinja file"
                f"{suggest(self.chat_template, TEMPLATES)}"
            )
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"model.chat_template={self.chat_template}: not UTF-8, so no Jinja file") from None

    # --- finding ---

    def _read(self, kind: Any, source: str, **arguments: Any) -> PreTrainedModel:
        """Call ``from_pretrained``; raise if weights are missing from the files or would be left out."""
        check_index(source)
        with defer_transformers_log():
            model, report = self._found(kind.from_pretrained, source, output_loading_info=True, **arguments)
            check_loaded(model, report, f"model.path={source}")
        return model

    def _made(self, make: Callable[..., Any], source: Any, **arguments: Any) -> Any:
        """Return ``make(source)``; raise UserError if the architecture lacks the attention kernel."""
        try:
            return make(source, **arguments)
        except (ValueError, ImportError) as error:
            if "attention implementation" not in str(error):
                raise
            other = "eager" if self.attention == "sdpa" else "sdpa"
            raise UserError(
                f"model.attention={self.attention}: this architecture does not have it; type model.attention={other}"
            ) from error

    def _found(self, read: Callable[..., Any], source: str, **arguments: Any) -> Any:
        """Read from a directory, a hub id or a GGUF file; raise UserError if the source is missing or unreadable."""
        arguments.setdefault("trust_remote_code", self.trust_remote_code)
        if source.endswith(".gguf"):
            source = converted(source)
        elif re.match(r"^[./~]", source) and not Path(source).is_dir():
            raise UserError(f"model.path={source}: no such folder")
        elif not Path(source).is_dir():
            hub.use_cache_if_unreachable()
        with readable(f"model.path={source}"):
            return self._made(read, source, **arguments)

    @property
    def folder(self) -> str | None:
        """Return the directory of the model.

        It is ``path``, or the model directory inside a run directory, or the directory converted from a GGUF file; None
        for random weights.
        """
        if self.path is None:
            return None
        if self.path.endswith(".gguf"):
            return converted(self.path)
        inner = Path(self.path) / "model"
        if not (Path(self.path) / "config.json").exists() and (inner / "config.json").exists():
            return str(inner)
        return self.path

    def _adapters(self) -> list[Path]:
        """Return the adapters to apply to ``_base_path``, lowest first; empty unless ``path`` is an adapter alone."""
        return resolve_adapters(self.folder)[0] if self.folder is not None else []

    def _base_path(self) -> str:
        """Return the path of the full weights."""
        return resolve_adapters(str(self.folder))[1]

    @property
    def scalar(self) -> bool:
        """Return whether ``path`` is a reward or value model, with a scalar head and no vocabulary projection."""
        if self.path is None:
            return False
        names = getattr(self.config(), "architectures", None)
        return isinstance(names, list) and any(str(name).endswith("ForSequenceClassification") for name in names)

    def _check_memory(self, config: PreTrainedConfig, bytes_per_weight: int) -> None:
        """Raise UserError before allocation if this machine cannot hold the weights; GPU machines are not checked."""
        if torch.cuda.is_available():
            return
        with readable(f"model.path={self.path}"), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=self.trust_remote_code)
        need = sum(parameter.numel() for parameter in model.parameters()) * bytes_per_weight
        have = total_memory()
        if need > have:
            raise UserError(
                f"the weights alone take {need / 2**30:.0f} GiB and this machine has {have / 2**30:.0f} GiB: "
                "type a smaller model=..., precision=bf16_true or adapter=qlora"
            )


def total_memory() -> int:
    """Return the bytes of memory that this process may use: the machine's memory or its container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    return total


def _device() -> str:
    """Return the device of quantised weights: quantising on the device itself avoids a copy of the full weights."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that ends a response: the chat template's end of turn, or EOS without a template."""
    if tokenizer.chat_template:
        return end_of_turn_id(tokenizer)
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has neither a chat template nor an eos token: type model.chat_template=chatml")
    return int(tokenizer.eos_token_id)


def _set_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Set a padding token that differs from the end of a response.

    Plain transformers find the last token by ``id != pad``.
    """
    end = _end_id(tokenizer)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != end:
        return
    vocabulary = tokenizer.get_vocab()
    unknown = [tokenizer.unk_token] if tokenizer.unk_token else []
    for token in [*PAD_TOKENS, *unknown]:
        if vocabulary.get(token, end) != end:
            tokenizer.pad_token = token
            return
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})


def _plain(value: Any) -> Any:
    """Convert containers of any kind to dicts and lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
