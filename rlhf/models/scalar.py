"""A scalar at every token, or at the last: value and reward models."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from rlhf.errors import UserError
from rlhf.model_config import score_scale
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM, Corpus
from rlhf.models.language_model import LanguageModel, materialize
from rlhf.models.lineage import adapter_beside
from rlhf.models.precision import Precision
from rlhf.models.reading import readable

FP32 = Precision("32-true")
SAFETY_HEAD = "safety_head.safetensors"


class ScalarModel(nn.Module):
    """A decoder with a linear head of one output: ``scale * (w . h) + bias``.

    ``w`` starts as N(0, 1 / (D + 1)), that is a standard deviation of 1 / sqrt(D + 1) (Stiennon et al. 2020, Huang et
    al. 2024). ``scale`` and ``bias`` are no parameters; they normalise scores once trained (see ``calibrate``).
    ``log_odds`` is what a normalised score is multiplied by to be in the units of the loss it was trained with, whose
    differences are log-odds of a preference.

    Args:
        language_model: The decoder; its vocabulary projection, if it has one, is not used.
        zero_init: Starts from w = 0, so that a value model first predicts 0 everywhere.

    ``safety_head``, where there is one, tells unsafe replies from the same hidden state (see ``add_safety_head``).
    """

    scale: Tensor
    bias: Tensor
    log_odds: float = 1.0

    def __init__(self, language_model: LanguageModel, zero_init: bool = False) -> None:
        super().__init__()
        self.language_model = language_model
        projection = language_model.base.get_output_embeddings()
        if projection is not None and projection.weight is not language_model.base.get_input_embeddings().weight:
            projection.requires_grad_(False)  # it would be a parameter without a gradient
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
        """A scalar model from a model or run folder or a hub id, from ``conf/model``, or around a language model.

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
            model.take_heads(head, Path(spec.folder or ""))
        return model

    def take_heads(self, head: Tensor, folder: Path) -> None:
        """Takes up the head [1, D] of a stored reward model, and its normalisation and safety head from its folder."""
        self.head.weight.data.copy_(head)
        stored = score_scale(folder)
        if stored is not None:
            self.scale.fill_(stored["scale"])
            self.bias.fill_(stored["bias"])
            self.log_odds = stored["log_odds"]
        elif (folder.parent / "status.json").is_file():  # a run of ours, which writes it
            raise UserError(
                f"{folder / 'rlhf.json'}: not there, so the scores' scale is unknown; make the reward model again"
            )
        file = folder / SAFETY_HEAD
        if file.is_file():
            with readable(str(file), "make the reward model again"):
                self.add_safety_head().load_state_dict(load_file(file))

    def add_safety_head(self) -> nn.Linear:
        """The auxiliary head of Llama 2 (arXiv 2307.09288, section 3.2.2): logit that a reply is unsafe, from w = 0.

        The one there is, if there is one.
        """
        if self.safety_head is None:
            self.safety_head = nn.Linear(self.language_model.hidden_size, 1, device=self.device)
            nn.init.zeros_(self.safety_head.weight)
            nn.init.zeros_(self.safety_head.bias)
        return self.safety_head

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The decoder's tokenizer."""
        return self.language_model.tokenizer

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return self.language_model.pad_id

    @property
    def end_id(self) -> int:
        """Id of the token that ends a reply."""
        return self.language_model.end_id

    @property
    def context_length(self) -> int:
        """Most tokens the model was built for."""
        return self.language_model.context_length

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters that receive gradients: the head's, and the decoder's or its adapter's."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def disable_dropout(self) -> "ScalarModel":
        """Itself with every dropout at 0."""
        self.language_model.disable_dropout()
        return self

    def values(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """A scalar at every token, [B, T] -> [B, T] float32. At padding it means nothing."""
        return self.project(self.language_model.hidden(ids, attention_mask, position_ids))

    def scores(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """The scalar at the last token attended to, [B, T] -> [B] float32.

        Which token is last follows from the mask, never from token identity: an end-of-sequence token that doubles as
        padding is read all the same.
        """
        return self.project(self.last_hidden(ids, attention_mask, position_ids))

    def last_hidden(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """The hidden state of the last token attended to, [B, T] -> [B, D]: what both heads read."""
        hidden = self.language_model.hidden(ids, attention_mask, position_ids)
        order = torch.arange(ids.shape[1], device=ids.device)
        last = torch.where(attention_mask.bool(), order, 0).amax(dim=1)
        return hidden[torch.arange(len(ids), device=ids.device), last]

    def unsafe_logits(self, hidden: Tensor) -> Tensor:
        """Logit of "this reply is unsafe" from last hidden states, [B, D] -> [B] float32."""
        assert self.safety_head is not None
        with torch.autocast(hidden.device.type, enabled=False):
            weight, bias = self.safety_head.weight.float(), self.safety_head.bias.float()
            return F.linear(hidden.float(), weight, bias).squeeze(-1)

    def forward(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """``scores``."""
        return self.scores(ids, attention_mask, position_ids)

    def project(self, hidden: Tensor) -> Tensor:
        """The scalar of hidden states, [..., D] -> [...] float32."""
        # In float32 whatever the precision: bfloat16 has 8 bits, two close scores would be equal.
        with torch.autocast(hidden.device.type, enabled=False):
            raw = F.linear(hidden.float(), self.head.weight.float()).squeeze(-1)
            return self.scale.float() * raw + self.bias.float()

    @torch.no_grad()
    def calibrate(self, scores: Tensor) -> None:
        """Sets scale and bias so that these scores [N] of this model get mean 0 and standard deviation 1.

        Raises:
            UserError: If the scores do not differ.
        """
        std, mean = torch.std_mean(scores.float())
        if not std > 0:
            raise UserError("reward normalisation: all scores are equal, there is nothing to scale by")
        self.bias.copy_((self.bias - mean) / std)
        self.scale.copy_(self.scale / std)
        self.log_odds *= std.item()

    def save(self, folder: Path | str) -> None:
        """Writes a Hugging Face ``*ForSequenceClassification`` folder with one output, adapter merged in.

        Plain transformers give the scores before scale and bias, which are in ``rlhf.json`` beside them.
        An adapter is written by itself too, as ``adapter_beside`` says.
        """
        folder = Path(folder)
        base = self.language_model.base
        config = self.language_model.stored_config()
        kind = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
        if kind is None:
            raise UserError(f"transformers has no sequence classifier of model type '{config.model_type}'")
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
        self.language_model.save_adapter(adapter_beside(folder))
        numbers = {"scale": self.scale.item(), "bias": self.bias.item(), "log_odds": self.log_odds}
        if self.safety_head is not None:
            head = {name: value.detach().cpu().contiguous() for name, value in self.safety_head.state_dict().items()}
            save_file(head, folder / SAFETY_HEAD)
        (folder / "rlhf.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")

    def _apply(self, fn, recurse: bool = True) -> "ScalarModel":  # type: ignore[no-untyped-def]
        # scale and bias stay float32 when the model is cast, as the decoder's own buffers do
        scale, bias = self.scale, self.bias
        super()._apply(fn, recurse)
        self.scale, self.bias = scale.to(self.scale.device), bias.to(self.bias.device)
        return self
