"""Language model with its tokenizer, split into hidden states and output projection.

Algorithms need log-probabilities of given tokens, not the logits of the whole vocabulary. So the decoder and the
projection to the vocabulary are two calls, and the projection runs only at the positions whose log-probabilities are
needed.
"""

import copy
import inspect
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.data.collate import TokenBatch
from rlhf.errors import UserError, key
from rlhf.functional.logprobs import token_logprobs
from rlhf.models import padding_free
from rlhf.models.adapters import TRAINED, NoAdapter
from rlhf.models.dropout import disable_dropout, variation
from rlhf.models.growing_cache import grow
from rlhf.models.lineage import adapter_path, write_base
from rlhf.models.module_state import evaluating, in_mode
from rlhf.models.padding_free import MIN_SAVING, Layout, find_starts, lay_out, take
from rlhf.models.peft_types import is_peft_model
from rlhf.models.precision import Precision
from rlhf.models.saving import materialize, merged_state, plain_config

if TYPE_CHECKING:
    from peft import PeftModel


class LanguageModel(nn.Module):
    """Causal decoder with its tokenizer, with or without an adapter.

    Args:
        model: A Hugging Face causal LM, or a PEFT model around one. A bare decoder is accepted too; it has no ``head``.
        tokenizer: Its tokenizer, with a padding token.
        end_id: Id of the token that ends a response.
        plain: For a quantised base, loads the same weights unquantised. Saving merges adapters into those, because
            merging into 4-bit weights would round the adapter away.
        origin: Path of the weights below the trained adapter; None for random weights.

    ``shared`` is the ``SharedBase`` of this and other roles, or None. ``padding_free`` is whether passes without cache
    compute every distinct token once (``rlhf.models.padding_free``).
    """

    def __init__(
        self,
        model: "PreTrainedModel | PeftModel",
        tokenizer: PreTrainedTokenizerBase,
        end_id: int,
        plain: Callable[[], PreTrainedModel] | None = None,
        origin: str | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.end_id = end_id
        self.pad_id = int(tokenizer.pad_token_id)
        self._plain = plain
        self.origin = origin
        self.shared: Any = None
        self.padding_free = False  # set by `enable_padding_free`
        self.decodes_in_slots: bool | None = None  # None: not tried yet (rlhf.sampler.continuous_batching)
        # How it was loaded; a critic is loaded in the same way.
        self.adapter, self.precision = NoAdapter(), Precision("32-true")
        self.spec: Any = None  # the CausalLM that loaded it
        self._config: PreTrainedConfig | None = None  # as loaded; set when `disable_dropout` changes the model's own

    # --- properties ---

    @property
    def adapted(self) -> bool:
        """Return whether the model has an adapter."""
        return is_peft_model(self.model)

    @property
    def base(self) -> PreTrainedModel:
        """Hugging Face model without the PEFT wrapper; adapter weights, if any, are inside its layers."""
        return self.model.get_base_model() if is_peft_model(self.model) else self.model

    @property
    def config(self) -> PreTrainedConfig:
        """Configuration of the text model."""
        return self.base.config.get_text_config()

    @property
    def hidden_size(self) -> int:
        """Width D of the hidden states."""
        return int(self.config.hidden_size)

    @property
    def context_length(self) -> int:
        """Maximum number of tokens that the model was built for."""
        return int(self.config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def is_fake(self) -> bool:
        """Return whether the weights are fake tensors, which have shapes and no values."""
        return isinstance(next(self.parameters()), FakeTensor)

    @cached_property
    def _cache_name(self) -> str:
        """Name of the decoder's argument and output field for the key-value cache.

        transformers 5.24 renamed ``past_key_values`` and removes it in 5.40; older versions and remote code keep it.
        """
        parameters = inspect.signature(self.base.get_decoder().forward).parameters
        return "cache" if "cache" in parameters else "past_key_values"

    @property
    def _plain_head(self) -> bool:
        """Return whether the logits are the unmodified output of the projection."""
        changes = ("logits_scaling", "logit_scale", "final_logit_softcapping")
        return all(getattr(self.config, name, None) is None for name in changes)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that receive gradients: all of them, or only the adapter's."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    # --- computation ---

    def hidden(self, tokens: TokenBatch) -> Tensor:
        """Compute the last hidden states, [B, T] -> [B, T, D], adapter included, without the vocabulary projection.

        Padding may be on the left, on the right or absent: the states of real tokens are the same. Positions that
        restart inside a row mark packed documents; a token attends only to its own document.

        Args:
            tokens: B rows of T tokens.
        """
        layout = None if self.is_fake else self.layout(tokens)
        if layout is None:
            return self._padded_hidden(tokens)
        return take(self.distinct_hidden(layout), layout.places)

    def hidden_at(self, tokens: TokenBatch, selected: Tensor) -> Tensor:
        """Compute the last hidden states of selected tokens alone, [n, D] in row-major order.

        Args:
            tokens: B rows of T tokens.
            selected: True on the n tokens, none of them padding, [B, T] bool.
        """
        layout = None if self.is_fake else self.layout(tokens)
        if layout is None:
            return self._padded_hidden(tokens)[selected]
        return take(self.distinct_hidden(layout), layout.places[selected])

    def layout(self, tokens: TokenBatch) -> Layout | None:
        """Return the layout of a pass over distinct tokens; None for a batch that is better computed as it is."""
        mask, positions = tokens.attention_mask, tokens.position_ids
        if not mask.any():
            return None
        starts = find_starts(mask, positions)
        packed = bool((starts[:, 1:] & mask[:, :-1]).any())  # a document starts right after another one
        if not (packed or self.padding_free):
            return None
        layout = lay_out(tokens.ids, mask, positions, starts)
        return layout if packed or layout.saving >= MIN_SAVING else None

    def distinct_hidden(self, layout: Layout) -> Tensor:
        """Compute the last hidden states of the distinct tokens of a layout, [N, D]."""
        compute = padding_free.hidden_states if self.padding_free else padding_free.hidden_states_by_document
        return compute(self.base.get_decoder(), layout)

    def _padded_hidden(self, tokens: TokenBatch) -> Tensor:
        """Compute the last hidden states of a batch of unpacked rows as it is, [B, T] -> [B, T, D]."""
        mask, position_ids = tokens.attention_mask, tokens.position_ids
        if (mask[:, 1:] <= mask[:, :-1]).all() and bool((position_ids[:, 0] == 0).all()):
            # Right padding: no real token attends to padding, so causal attention needs no mask: the fast kernel.
            arguments: dict[str, Any] = {}
        else:
            arguments = {"attention_mask": mask.long(), "position_ids": position_ids}
        return self.base.get_decoder()(input_ids=tokens.ids, use_cache=False, **arguments).last_hidden_state

    def step(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Compute the hidden states of new tokens given the cache of earlier tokens: ([B, S, D], cache).

        Args:
            ids: New tokens, [B, S] long.
            attention_mask: 1 on every token so far, new ones included, [B, T].
            position_ids: Positions of the new tokens, [B, S] long.
            cache: Cache returned by the previous decode step; None for the first.
        """
        output = self.base.get_decoder()(
            input_ids=ids,
            attention_mask=attention_mask.long(),
            position_ids=position_ids,
            use_cache=True,
            **{self._cache_name: cache},
        )
        grown = getattr(output, self._cache_name)
        return output.last_hidden_state, grow(grown) if cache is None else grown

    def head(self, hidden: Tensor) -> Tensor:
        """Compute the logits of hidden states, [..., D] -> [..., V], scaled or capped as the architecture does.

        Raises:
            TypeError: If the model is a bare decoder.
        """
        projection = self.base.get_output_embeddings()
        if projection is None:
            raise TypeError("a bare decoder has no vocabulary projection")
        logits = projection(hidden)
        config = self.config
        scaling = getattr(config, "logits_scaling", None)
        if scaling is not None:  # Granite divides, HyperCLOVA X multiplies
            logits = logits * scaling if config.model_type == "hyperclovax" else logits / scaling
        scale = getattr(config, "logit_scale", None)
        if scale is not None:  # Cohere
            logits = logits * scale
        cap = getattr(config, "final_logit_softcapping", None)
        if cap is not None:  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return logits

    def logprobs(
        self, tokens: TokenBatch, temperature: float = 1.0, entropy: bool = False, uniform: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the log-probabilities of the tokens in ``loss_mask``.

        ``logp[b, t] = log p(ids[b, t] | ids[b, :t])`` where ``loss_mask[b, t]``, 0 elsewhere. The first column has no
        prediction and is 0 whatever its mask. Only masked positions are projected to the vocabulary.

        Args:
            tokens: B rows of T tokens; ``loss_mask`` selects the targets.
            temperature: Divides the logits.
            entropy: Whether to return the entropy (nats) of the distribution that each target token was drawn from.
            uniform: Whether the loss is a mean of these log-probabilities, which saves a projection in its gradient
                (``token_logprobs``). The results are the same.

        Returns:
            logp [B, T] float32, and entropy [B, T] float32 or None.
        """
        ids = tokens.ids
        counts = tokens.loss_mask.bool().clone()
        counts[:, 0] = False
        predicts = torch.zeros_like(counts)
        predicts[:, :-1] = counts[:, 1:]  # position t-1 predicts token t
        rows = self.hidden_at(tokens, predicts)
        logp = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        entropies = torch.zeros_like(logp) if entropy else None
        if len(rows) == 0:
            return logp + rows.float().sum() * 0.0, entropies  # keep the graph, so that every rank has a gradient
        projection = self.base.get_output_embeddings() if self._plain_head else self.head  # nn.Linear: a faster path
        values, spread = token_logprobs(rows, ids[counts], projection, temperature, entropy=entropy, uniform=uniform)
        logp = logp.masked_scatter(counts, values.float())
        if entropies is not None and spread is not None:
            entropies = entropies.masked_scatter(counts, spread.float())
        return logp, entropies

    def forward(
        self, tokens: TokenBatch, temperature: float = 1.0, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Call ``logprobs``."""
        return self.logprobs(tokens, temperature, entropy)

    # --- roles ---

    def frozen(self) -> "LanguageModel":
        """Freeze all weights, switch to eval mode, and return the model itself."""
        self.requires_grad_(False)
        return self.eval()

    def disable_dropout(self) -> "LanguageModel":
        """Set every dropout to 0 and return the model itself.

        Sampling, scoring and training must use the same policy.
        """
        if self._config is None:
            self._config = copy.deepcopy(self.base.config)
        disable_dropout(self.model)
        return self

    def check_repeatable(self) -> None:
        """Raise if two passes in training mode differ although ``disable_dropout`` was called.

        Without that call, nothing is checked.

        Raises:
            UserError: If the architecture has a source of noise that ``disable_dropout`` does not find.
        """
        if self._config is None:
            return
        ids = torch.arange(4, device=self.device)[None] % self.config.vocab_size
        with in_mode(self, training=True):
            difference = variation(lambda: self.hidden(TokenBatch.of(ids, torch.ones_like(ids))))
        if not difference <= 1e-2:  # kernels may sum in another order; a nan must fail too
            raise UserError(
                f"model type '{self.config.model_type}' computes different hidden states in every training pass (by "
                f"{difference:.2g} of the largest), so policy, reference and sampler would differ",
                fix=f"set the dropout in the config.json of {key('model.path')} to 0, or use another architecture",
            )

    def enable_padding_free(self) -> "LanguageModel":
        """Compute every distinct token once if the architecture allows it, and return the model itself."""
        self.padding_free = padding_free.enable(self.base)
        if self.padding_free and not self.is_fake:
            with evaluating(self):
                self.padding_free = padding_free.agrees(self.base.get_decoder(), self.device)
        return self

    def gradient_checkpointing(self, every: int = 1) -> "LanguageModel":
        """Recompute the activations of every n-th layer in the backward pass, and return the model itself.

        With all layers it takes about a third more time, and of a layer only its input is kept.
        """
        if hasattr(self.base, "activation_checkpointing_enable"):  # from transformers 5.20 on
            self.base.activation_checkpointing_enable({"use_reentrant": False})
        else:
            self.base.gradient_checkpointing_enable({"use_reentrant": False})
        for index, layer in enumerate(m for m in self.base.modules() if isinstance(m, GradientCheckpointingLayer)):
            layer.gradient_checkpointing = index % every == 0
        return self

    # --- saving ---

    def stored_config(self) -> PreTrainedConfig:
        """Return the configuration to save: without quantisation, with dropout as it was loaded."""
        return plain_config(self._config or self.base.config)

    def merged_state(self) -> dict[str, Tensor]:
        """Return the state dict of the base with the adapter merged in; the live weights stay bit-identical."""
        return merged_state(self.base, self._plain)

    def save(self, folder: Path | str) -> None:
        """Save a Hugging Face directory: merged weights (safetensors), tokenizer, chat template, generation config.

        An adapter is also saved alone, at the path from ``adapter_path``.
        """
        folder = Path(folder)
        model = materialize(type(self.base), self.stored_config(), self.merged_state())
        generation = copy.deepcopy(self.base.generation_config) or GenerationConfig()
        generation.pad_token_id = self.pad_id
        known = generation.eos_token_id
        ends = [] if known is None else [known] if isinstance(known, int) else list(known)
        generation.eos_token_id = self.end_id if ends in ([], [self.end_id]) else sorted({*ends, self.end_id})
        model.generation_config = generation
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.save_adapter(adapter_path(folder))

    def save_adapter(self, folder: Path) -> None:
        """Save the trained adapter alone, in PEFT's format, with a record of its base; without an adapter, do nothing.

        The record is only written for a base with a path.
        """
        if not is_peft_model(self.model):
            return
        self.model.peft_config[TRAINED].base_model_name_or_path = self.origin
        self.model.save_pretrained(str(folder), selected_adapters=[TRAINED])
        if self.origin is not None:
            write_base(folder, self.origin)

    def check_head(self) -> None:
        """Raise UserError unless ``head(hidden(x))`` equals the architecture's own logits.

        A model on fake tensors, whose logits have no values, is not checked.
        """
        if self.is_fake:
            return
        ids = torch.arange(4, device=self.device)[None] % self.config.vocab_size
        with torch.no_grad(), evaluating(self):
            ours = self.head(self.hidden(TokenBatch.of(ids, torch.ones_like(ids)))).float()
            theirs = self.base(input_ids=ids, use_cache=False).logits.float()
        difference = (ours - theirs).abs().max().item()
        if not difference <= 2e-2 * theirs.abs().max().item() + 1e-3:  # loose: kernels differ in half precision
            raise UserError(
                f"model type '{self.config.model_type}' changes its logits after the projection (by {difference:.2g}), "
                "and LanguageModel.head has no code for it",
                fix="use another architecture, or add the change to LanguageModel.head",
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LanguageModel":
        # Casting a model to bf16 (as Lightning's bf16-true does) would also cast the rotary frequencies, and positions
        # beyond a few hundred would lose precision. transformers keeps them in float32, and so does this method.
        before = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.dtype == torch.float32
        ]
        super()._apply(fn, recurse)
        for module, name, buffer in before:
            now = module._buffers[name]
            if now is not None and now.dtype != buffer.dtype:
                module._buffers[name] = buffer.to(now.device)
        return self
