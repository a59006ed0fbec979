"""Value and reward models: a scalar at every token, or at the last token."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from rlhf.data.collate import TokenBatch
from rlhf.errors import UserError, key
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.language_model import LanguageModel
from rlhf.models.lineage import adapter_path
from rlhf.models.load_errors import convert_read_errors
from rlhf.models.precision import Precision
from rlhf.models.saved_config import score_scale
from rlhf.models.saving import materialize
from rlhf.models.tokenizer_loading import Corpus

FP32 = Precision("32-true")
SAFETY_HEAD = "safety_head.safetensors"


class ScalarModel(nn.Module):
    """Decoder with a linear head of one output: ``scale * (w . h) + bias``.

    ``w`` starts as N(0, 1 / (D + 1)), that is a standard deviation of 1 / sqrt(D + 1) (Stiennon et al. 2020, Huang et
    al. 2024). ``scale`` and ``bias`` are not parameters; they normalise scores after training (see ``calibrate``). A
    normalised score times ``log_odds`` is in the units of the loss that it was trained with, whose differences are
    log-odds of a preference.

    Args:
        language_model: The decoder; its vocabulary projection, if any, is not used.
        zero_init: Whether to start from w = 0, so that a value model first predicts 0 everywhere.

    ``safety_head``, if any, classifies unsafe responses from the same hidden state (see ``add_safety_head``).
    """

    scale: Tensor
    bias: Tensor
    log_odds: float = 1.0

    def __init__(self, language_model: LanguageModel, zero_init: bool = False) -> None:
        super().__init__()
        self.language_model = language_model
        projection = language_model.base.get_output_embeddings()
        if projection is not None and projection.weight is not language_model.base.get_input_embeddings().weight:
            projection.requires_grad_(False)  # otherwise it is a trainable parameter without a gradient
        width = language_model.hidden_size
        self.head = nn.Linear(width, 1, bias=False, device=language_model.device)
        if zero_init:
            nn.init.zeros_(self.head.weight)
        else:
            nn.init.normal_(self.head.weight, std=1 / math.sqrt(width + 1))
        self.safety_head: nn.Linear | None = None
        self.register_buffer("scale", torch.ones((), device=language_model.device))
        self.register_buffer("bias", torch.zeros((), device=language_model.device))

    @classmethod
    def load(
        cls,
        source: "str | Path | CausalLM | LanguageModel",
        adapter: NoAdapter | None = None,
        precision: Precision = FP32,
        zero_init: bool = False,
        corpus: Corpus | None = None,
    ) -> "ScalarModel":
        """Load a scalar model from a model or run directory, a hub id, a ``CausalLM``, or around a language model.

        The head is the stored one if there is one (a reward model), else a fresh one (a language model).
        """
        if isinstance(source, LanguageModel):
            return cls(source, zero_init)
        if isinstance(source, CausalLM):
            spec = source
        else:
            spec = CausalLM(path=str(source), architecture=None, vocab_size=None)
        decoder, head = spec.load_decoder(adapter or NoAdapter(), precision, corpus)
        model = cls(decoder, zero_init)
        if head is not None:
            model.load_heads(head, Path(spec.folder or ""))
        return model

    def load_heads(self, head: Tensor, folder: Path) -> None:
        """Load the head [1, D] of a stored reward model, and the normalisation and safety head in its directory.

        Raises:
            UserError: If a run's model has no rlhf.json, or a file cannot be read.
        """
        self.head.weight.data.copy_(head)
        stored = score_scale(folder)
        if stored is not None:
            self.scale.fill_(stored["scale"])
            self.bias.fill_(stored["bias"])
            self.log_odds = stored["log_odds"]
        elif (folder.parent / "status.json").is_file():  # a run directory, whose model always has rlhf.json
            raise UserError(
                f"{folder / 'rlhf.json'}: is missing, so the scale of the scores is unknown",
                fix="train the reward model again",
            )
        file = folder / SAFETY_HEAD
        if file.is_file():
            with convert_read_errors(file, "train the reward model again"):
                self.add_safety_head().load_state_dict(load_file(file))

    def add_safety_head(self) -> nn.Linear:
        """Add the auxiliary safety head of Llama 2, starting from w = 0, or return the existing one.

        Its output is the logit that a response is unsafe (arXiv 2307.09288, section 3.2.2).
        """
        if self.safety_head is None:
            self.safety_head = nn.Linear(self.language_model.hidden_size, 1, device=self.device)
            nn.init.zeros_(self.safety_head.weight)
            nn.init.zeros_(self.safety_head.bias)
        return self.safety_head

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the decoder."""
        return self.language_model.tokenizer

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return self.language_model.pad_id

    @property
    def end_id(self) -> int:
        """Id of the token that ends a response."""
        return self.language_model.end_id

    @property
    def context_length(self) -> int:
        """Maximum number of tokens that the model was built for."""
        return self.language_model.context_length

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.head.weight.device

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that receive gradients: the head's, and the decoder's or its adapter's."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def disable_dropout(self) -> "ScalarModel":
        """Set every dropout to 0 and return the model itself."""
        self.language_model.disable_dropout()
        return self

    def values(self, tokens: TokenBatch) -> Tensor:
        """Compute the scalar at every token, [B, T] -> [B, T] float32; values at padding are meaningless."""
        return self.project(self._hidden(tokens))

    def scores(self, tokens: TokenBatch) -> Tensor:
        """Compute the scalar at the last attended token, [B, T] -> [B] float32.

        The last token follows from the mask, never from token identity: an end-of-sequence token that doubles as
        padding is still read.
        """
        return self.project(self.last_hidden(tokens))

    def last_hidden(self, tokens: TokenBatch) -> Tensor:
        """Compute the hidden state of the last attended token, [B, T] -> [B, D], the input of both heads."""
        order = torch.arange(tokens.ids.shape[1], device=tokens.ids.device)
        last = torch.where(tokens.attention_mask.bool(), order, 0).amax(dim=1)
        return self.language_model.hidden_at(tokens, order == last[:, None])

    def _hidden(self, tokens: TokenBatch) -> Tensor:
        return self.language_model.hidden(tokens)

    def unsafe_logits(self, hidden: Tensor) -> Tensor:
        """Compute the logit of "this response is unsafe" from last hidden states, [B, D] -> [B] float32."""
        assert self.safety_head is not None
        with torch.autocast(hidden.device.type, enabled=False):
            weight, bias = self.safety_head.weight.float(), self.safety_head.bias.float()
            return F.linear(hidden.float(), weight, bias).squeeze(-1)

    def forward(self, tokens: TokenBatch) -> Tensor:
        """Call ``scores``."""
        return self.scores(tokens)

    def project(self, hidden: Tensor) -> Tensor:
        """Compute the scalar of hidden states, [..., D] -> [...] float32."""
        # In float32 at every precision: bfloat16 has 8 significant bits, so two close scores would be equal.
        with torch.autocast(hidden.device.type, enabled=False):
            raw = F.linear(hidden.float(), self.head.weight.float()).squeeze(-1)
            return self.scale.float() * raw + self.bias.float()

    @torch.no_grad()
    def calibrate(self, scores: Tensor) -> None:
        """Set scale and bias so that these scores [N] of this model get mean 0 and standard deviation 1.

        Raises:
            UserError: If all scores are equal.
        """
        std, mean = torch.std_mean(scores.float())
        if not std > 0:
            raise UserError(
                "all scores are equal, so the reward model cannot be normalised",
                fix=f"train it on other data, or type {key('stage.normalize', 'mean')}",
            )
        self.bias.copy_((self.bias - mean) / std)
        self.scale.copy_(self.scale / std)
        self.log_odds *= std.item()

    def save(self, folder: Path | str) -> None:
        """Save a Hugging Face ``*ForSequenceClassification`` directory with one output, adapter merged in.

        Plain transformers compute the scores before scale and bias, which are in ``rlhf.json`` in the same directory.
        An adapter is also saved alone, at the path from ``adapter_path``.
        """
        folder = Path(folder)
        base = self.language_model.base
        config = self.language_model.stored_config()
        kind = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
        if kind is None:
            raise UserError(
                f"transformers has no sequence classifier of model type '{config.model_type}'",
                fix="use another architecture",
            )
        config.num_labels = 1
        config.pad_token_id = self.pad_id
        prefix = f"{kind.base_model_prefix}."
        state = self.language_model.merged_state()
        if base.get_decoder() is base:
            state = {prefix + name: value for name, value in state.items()}
        else:
            state = {name: value for name, value in state.items() if name.startswith(prefix)}
        state["score.weight"] = self.head.weight.detach()
        materialize(kind, config, state).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.language_model.save_adapter(adapter_path(folder))
        numbers = {"scale": self.scale.item(), "bias": self.bias.item(), "log_odds": self.log_odds}
        if self.safety_head is not None:
            head = {name: value.detach().cpu().contiguous() for name, value in self.safety_head.state_dict().items()}
            save_file(head, folder / SAFETY_HEAD)
        (folder / "rlhf.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")

    def _apply(self, fn, recurse: bool = True) -> "ScalarModel":  # type: ignore[no-untyped-def]
        # scale and bias stay float32 when the model is cast, like the decoder's own buffers.
        scale, bias = self.scale, self.bias
        super()._apply(fn, recurse)
        self.scale, self.bias = scale.to(self.scale.device), bias.to(self.bias.device)
        return self
