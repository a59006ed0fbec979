"""Source of a language model: its directory, hub id or GGUF file, the adapters on it, and its configuration."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.chat_templates import TEMPLATES
from rlhf.data.rendering import check_syntax
from rlhf.errors import UserError, key, suggest
from rlhf.models.gguf import convert_gguf
from rlhf.models.lineage import resolve_adapters
from rlhf.models.load_errors import MODEL, convert_read_errors
from rlhf.models.saved_config import check_file_limits, read_config
from rlhf.models.special_tokens import find_end_id
from rlhf.storage import hub


@dataclass(frozen=True)
class ModelSource:
    """Source of a language model. Nothing is read before a method is called.

    Args:
        path: Directory, hub id, GGUF file, PEFT adapter directory, or run directory. None: random weights.
        architecture: Arguments of the model's configuration, used when ``path`` is None; ``model_type`` selects the
            family (default llama). With random weights the vocabulary has at least its ``vocab_size`` rows.
        vocab_size: Vocabulary size of the byte-level BPE that is trained on the corpus when there is neither ``path``
            nor ``tokenizer``.
        tokenizer: Directory or hub id of another tokenizer. None: the model's own.
        chat_template: "plain", "chatml", "llama2", "llama3", "zephyr" or a Jinja file, replacing the tokenizer's own
            template. None: keep the tokenizer's own.
        attention: Attention kernel: "sdpa" (PyTorch's fused kernel) or "eager" (written out).
        gradient_checkpointing: Whether activations are recomputed in the backward pass to save memory; n: those of
            every n-th layer alone.
        trust_remote_code: Whether Python code that comes with the weights may run.
        hub_id: Hub id of the published weights that ``architecture`` describes, so that planning knows their sizes and
            layers before they are downloaded. None: it describes random weights only.
    """

    path: str | None
    architecture: dict[str, Any] | None
    vocab_size: Annotated[int, Field(gt=0)] | None
    tokenizer: str | None = None
    chat_template: str | None = None
    attention: Literal["sdpa", "eager"] = "sdpa"
    gradient_checkpointing: bool | Annotated[int, Field(gt=0)] = False
    trust_remote_code: bool = False
    hub_id: str | None = None

    def __post_init__(self) -> None:
        if self.chat_template is not None:  # so that a malformed template fails now and not hours into a pipeline
            check_syntax(self.read_template())

    # --- directories ---

    @property
    def folder(self) -> str | None:
        """Directory of the model.

        It is ``path``, or the model directory inside a run directory, or the directory converted from a GGUF file; None
        for random weights.
        """
        if self.path is None:
            return None
        if self.path.endswith(".gguf"):
            return convert_gguf(self.path)
        inner = Path(self.path) / "model"
        if not (Path(self.path) / "config.json").exists() and (inner / "config.json").exists():
            return str(inner)
        return self.path

    @property
    def adapters(self) -> list[Path]:
        """Adapters to apply to the weights of ``base_path``, lowest first; only if ``path`` is an adapter alone."""
        return resolve_adapters(self.folder)[0] if self.folder is not None else []

    @property
    def base_path(self) -> str:
        """Path of the full weights."""
        return resolve_adapters(str(self.folder))[1]

    # --- content ---

    @property
    def scalar(self) -> bool:
        """Return whether ``path`` is a reward or value model, with a scalar head and no vocabulary projection."""
        if self.path is None:
            return False
        names = getattr(self.config(), "architectures", None)
        return isinstance(names, list) and any(str(name).endswith("ForSequenceClassification") for name in names)

    def config(self, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedConfig:
        """Return the model's configuration; with random weights, its vocabulary fits the tokenizer if one is given."""
        if self.path is not None:
            base = self.base_path
            shape = read_config(base)
            if shape is not None:  # check before transformers builds lists with one entry per layer
                check_file_limits(shape, self.path, "model.path")
            found = self.read(AutoConfig.from_pretrained, base)
            check_file_limits(found.to_dict(), self.path, "model.path")
            return found
        if self.architecture is None:
            raise UserError(
                "no weights given",
                fix=f"type {key('model.path', 'DIRECTORY_OR_HUB_ID')} or {key('inputs.policy', 'RUN')}",
                option="model.path",
            )
        arguments = _plain(self.architecture)
        family = arguments.pop("model_type", "llama")
        try:
            kind = type(AutoConfig.for_model(family))
        except ValueError as error:
            raise UserError(
                "transformers has no such model type",
                fix=f"type one that it has, such as {key('model.architecture.model_type', 'llama')}",
                option="model.architecture.model_type",
                value=family,
            ) from error
        known = {field.name for field in dataclasses.fields(kind)}
        for name in arguments:
            if name not in known:
                raise UserError(
                    f"{family} has no such setting{suggest(name, known)}", option=f"model.architecture.{name}"
                )
        if tokenizer is None:
            return kind(**{"vocab_size": self.vocab_size or 32000, **arguments})
        specials = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": find_end_id(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
        }
        rows = max(len(tokenizer), arguments.get("vocab_size") or 0)  # published models have spare rows
        return kind(**{**arguments, "vocab_size": rows, **specials})

    def build_on_meta(self, config: PreTrainedConfig | None = None) -> PreTrainedModel:
        """Build the model's layers on the meta device, without weights and without memory, from its own or a config."""
        with torch.device("meta"):
            made: PreTrainedModel = AutoModelForCausalLM.from_config(
                config or self.config(), trust_remote_code=self.trust_remote_code
            )
        return made

    def read_template(self) -> str:
        """Return the text of ``chat_template``; raise UserError if it is neither a template's name nor a Jinja file."""
        assert self.chat_template is not None
        if self.chat_template in TEMPLATES:
            return TEMPLATES[self.chat_template]
        file = Path(self.chat_template)
        if not file.is_file():
            raise UserError(
                "is neither the name of a template nor a Jinja file" + suggest(self.chat_template, TEMPLATES),
                option="model.chat_template",
                value=self.chat_template,
            )
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(
                "is not a Jinja file, which must be UTF-8 text",
                fix="save the file as UTF-8",
                option="model.chat_template",
                value=self.chat_template,
            ) from None

    def read(self, reader: Callable[..., Any], place: str, **arguments: Any) -> Any:
        """Return ``reader(place)``, where ``place`` is a directory, a hub id or a GGUF file.

        Raises:
            UserError: If the place is missing or unreadable, or the architecture lacks the attention kernel.
        """
        arguments.setdefault("trust_remote_code", self.trust_remote_code)
        option = "model.tokenizer" if place == self.tokenizer else "model.path"
        if place.endswith(".gguf"):
            place = convert_gguf(place)
        elif re.match(r"^[./~]", place) and not Path(place).is_dir():
            raise UserError("no such directory", MODEL, option, place)
        elif not Path(place).is_dir():
            hub.use_cache_if_unreachable()
        with convert_read_errors(place, option=option):
            return self.build(reader, place, **arguments)

    def build(self, builder: Callable[..., Any], content: Any, **arguments: Any) -> Any:
        """Return ``builder(content)``; raise UserError if the architecture lacks the attention kernel."""
        try:
            return builder(content, **arguments)
        except (ValueError, ImportError) as error:
            if "attention implementation" not in str(error):  # transformers raises no class of its own for it
                raise
            other = "eager" if self.attention == "sdpa" else "sdpa"
            raise UserError(
                "this architecture has no such attention kernel",
                fix=f"type {key('model.attention', other)}",
                option="model.attention",
                value=self.attention,
            ) from error


def _plain(value: Any) -> Any:
    """Convert containers of any kind to dicts and lists."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
