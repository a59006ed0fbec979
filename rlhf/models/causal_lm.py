"""Which language model: random weights of a named size, a Hugging Face folder, a hub id, a GGUF file, an adapter."""

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

from rlhf import hub
from rlhf.data.chat_templates import TEMPLATES, TOKENS
from rlhf.data.template import check_syntax, control_tokens, end_of_turn_id
from rlhf.data.tokenizer import train_tokenizer
from rlhf.errors import UserError, suggest
from rlhf.model_config import check_file_limits, written
from rlhf.models.adapters import NEEDS_WEIGHTS, NoAdapter, merged
from rlhf.models.gguf import converted
from rlhf.models.language_model import LanguageModel
from rlhf.models.lineage import ANEW, adapters_alone
from rlhf.models.precision import Precision
from rlhf.models.reading import check_index, check_loaded, quiet_if_refused, readable

if not sys.stderr.isatty():  # into a file or a pipe the bars of every load are only noise
    hf_logging.disable_progress_bar()

Corpus = Callable[[], Iterable[str]]

PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>")


@dataclass(frozen=True)
class CausalLM:
    """Where a language model comes from. Nothing is read before ``load``.

    Args:
        path: Folder, hub id, GGUF file, PEFT adapter folder, or run folder. None: random weights.
        architecture: Arguments of the model's configuration, used when ``path`` is None; ``model_type`` picks the
            family (default llama).
        vocab_size: Vocabulary of the byte-level BPE that is trained on the corpus when there is neither ``path`` nor
            ``tokenizer``.
        tokenizer: Folder or hub id of another tokenizer. None: the model's own.
        chat_template: "plain", "chatml", "llama2", "llama3", "zephyr" or a Jinja file, in place of the tokenizer's own.
            None: keep that.
        attention: Attention kernel: "sdpa" (PyTorch's fused one) or "eager" (written out).
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
        if self.chat_template is not None:  # before anything runs, not when a step of hours has ended
            check_syntax(self._template())

    # --- loading ---

    def load(self, adapter: NoAdapter, precision: Precision, corpus: Corpus | None = None) -> LanguageModel:
        """The model with its tokenizer and a fresh adapter.

        Args:
            adapter: What is trained on top of the weights.
            precision: Format of the weights.
            corpus: Gives the texts a tokenizer is trained on when there is none.

        Raises:
            UserError: For weights that cannot be found or do not fit the machine, or a model without a tokenizer.
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
        """The decoder without vocabulary projection, and the [1, D] scalar head stored with it, if there is one."""
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
        """Number of weights, counted without making any. Tied weights count once."""
        return sum(parameter.numel() for parameter in self.outline().parameters())

    def outline(self) -> PreTrainedModel:
        """The model's layers, without weights and without memory."""
        with torch.device("meta"):
            made: PreTrainedModel = AutoModelForCausalLM.from_config(
                self.config(), trust_remote_code=self.trust_remote_code
            )
        return made

    def config(self, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedConfig:
        """The model's configuration; for random weights with the tokenizer's vocabulary if one is given."""
        if self.path is not None:
            base = self._base_path()
            shape = written(base)
            if shape is not None:  # before lists as long as the number of layers are made
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
        """The tokenizer alone, with its padding token and chat template."""
        return self._tokenizer(corpus)

    def load_base(
        self, adapter: NoAdapter, precision: Precision, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[PreTrainedModel, Callable[[Any], Callable[[], PreTrainedModel]] | None]:
        """The causal LM that adapters are put on, quantised as ``adapter`` says, and what gives its plain weights.

        The second is None without quantisation; else it takes the class that is to read the weights.
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
        return language_model.train()  # from_pretrained gives eval mode

    def _plain_weights(self, kind: Any, precision: Precision, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """The weights as they were before quantisation."""
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
            self._check_learnable(tokenizer)
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
            with readable(f"model.path={self.path}: adapter {one}", ANEW):
                on_top = PeftModel.from_pretrained(model, str(one))
            model = merged(on_top, one).requires_grad_(True)  # PEFT froze what lies below
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
        return model

    def _check_learnable(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise UserError where the chat template writes tokens that the weights were never trained with.

        An adapter leaves the embedding frozen, so they would keep the numbers they were made with. It does not matter
        whether the embedding has rows for them: published models round its size up.
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
        _give_pad(tokenizer)
        return tokenizer

    def own_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer as it comes with ``tokenizer`` or ``path``, with its own template and padding or without."""
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
        """``from_pretrained`` that refuses weights it would have to make up or leave out."""
        check_index(source)
        with quiet_if_refused():
            model, report = self._found(kind.from_pretrained, source, output_loading_info=True, **arguments)
            check_loaded(model, report, f"model.path={source}")
        return model

    def _made(self, make: Callable[..., Any], source: Any, **arguments: Any) -> Any:
        """``make(source)``, with an attention kernel that the architecture lacks put in our words."""
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
        """Reads from a folder, a hub id or a GGUF file; what is not there is the user's to mend."""
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
        """``path``, or the model inside it where it is a run folder, or the folder that a GGUF file is read into."""
        if self.path is None:
            return None
        if self.path.endswith(".gguf"):
            return converted(self.path)
        inner = Path(self.path) / "model"
        if not (Path(self.path) / "config.json").exists() and (inner / "config.json").exists():
            return str(inner)
        return self.path

    def _adapters(self) -> list[Path]:
        """The adapters to be put on ``_base_path``, lowest first, if the folder holds a PEFT adapter and no model."""
        return adapters_alone(self.folder)[0] if self.folder is not None else []

    def _base_path(self) -> str:
        """Where the full weights are."""
        return adapters_alone(str(self.folder))[1]

    @property
    def scalar(self) -> bool:
        """Whether ``path`` is a reward or value model, which has a scalar head and no vocabulary projection."""
        if self.path is None:
            return False
        names = getattr(self.config(), "architectures", None)
        return isinstance(names, list) and any(str(name).endswith("ForSequenceClassification") for name in names)

    def _check_memory(self, config: PreTrainedConfig, bytes_per_weight: int) -> None:
        """Refuses weights that this machine cannot hold, before making them."""
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
    """Bytes of memory this process may use: the machine's, or its container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    return total


def _device() -> str:
    """Where quantised weights are made: quantising on the device itself spares a copy of the full weights."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a reply: the chat template's end of turn, or end of sequence without a template."""
    if tokenizer.chat_template:
        return end_of_turn_id(tokenizer)
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has neither a chat template nor an eos token: type model.chat_template=chatml")
    return int(tokenizer.eos_token_id)


def _give_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """A padding token that is not the end of a reply: plain transformers find the last token by ``id != pad``."""
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
    """Containers of any kind as dicts and lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
