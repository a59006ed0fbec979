"""Adapters: which weights are trained, and whether the frozen ones are quantised."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.errors import UserError, first_line, key, suggest
from rlhf.models.peft_types import is_tuner_layer
from rlhf.models.precision import Precision

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

TRAINED = "default"  # PEFT's name of the trained adapter; frozen adapters below it have other names


@dataclass(frozen=True)
class NoAdapter:
    """Full fine-tuning: every weight is trained."""

    def quantization_config(self, precision: Precision) -> BitsAndBytesConfig | None:
        """Return the quantisation config of the base, or None without quantisation."""
        return None

    def check_installed(self) -> None:
        """Check that the libraries of the adapter run on this machine, before weights are loaded; none is needed."""

    def prepare(self, model: PreTrainedModel) -> None:
        """Prepare a loaded base for an adapter."""

    def apply(self, model: PreTrainedModel) -> "PreTrainedModel | PeftModel":
        """Return the model with the adapter applied."""
        return model


@dataclass(frozen=True)
class LoRA(NoAdapter):
    """Low-rank adaptation: W + (alpha / rank) B A, with B = 0 at the start (Hu et al. 2021, eq. 3).

    Args:
        rank: Rank r of the update.
        alpha: Scale of the update, which is multiplied by alpha / rank.
        dropout: Dropout probability on the adapter's input, in [0, 1).
        modules: Names of the adapted linear layers, or "all-linear" for all except the output projection.
        shared_base: Whether all roles of a stage (policy, reference, value and reward model) are adapters on one copy
            of the base weights (``rlhf.models.shared_base``). If False, each role holds its own weights.
    """

    rank: Annotated[int, Field(gt=0)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    modules: str | list[str] = "all-linear"
    shared_base: bool = False

    decompose: ClassVar[bool] = False

    def apply(self, model: PreTrainedModel) -> "PeftModel":
        """Return the model with frozen weights and a fresh adapter, whose output at first equals the model's."""
        from peft import get_peft_model  # imported late: it takes seconds

        return get_peft_model(model, self.config(model), adapter_name=TRAINED)

    def config(self, model: PreTrainedModel) -> "LoraConfig":
        """Return PEFT's config of the adapter.

        Raises:
            UserError: See ``check_modules``.
        """
        from peft import LoraConfig  # imported late: it takes seconds

        self.check_modules(model)
        whole = self.modules == "all-linear"
        modules = [self.modules] if isinstance(self.modules, str) and not whole else self.modules
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # any number works, although PEFT's annotation is int
            lora_dropout=self.dropout,
            target_modules=modules if isinstance(modules, str) else list(modules),
            use_dora=self.decompose,
            bias="none",
            task_type="CAUSAL_LM" if model.get_output_embeddings() is not None else None,
        )

    def check_modules(self, model: PreTrainedModel) -> None:
        """Raise if a name in ``modules`` is not a layer of this model that can be adapted.

        It needs the model's layers, but no weights.

        Raises:
            UserError: If the model has no linear layers of these names, or one of them is the output projection and
                shares its weights with the input embedding: an update of one cannot be merged without changing the
                other.
        """
        if self.modules == "all-linear":  # PEFT excludes the output projection, tied or not
            return
        linear = (nn.Linear, Conv1D)  # GPT-2 implements its linear layers as Conv1D
        parts = {
            name.rpartition(".")[2]: part
            for name, part in model.named_modules()
            if isinstance(part, linear) or is_tuner_layer(part)
        }
        inner = ("base_layer", TRAINED)  # sub-modules of layers that already have an adapter
        names = {name for name in parts if name not in inner and not name.startswith("below_")}
        tied = tied_projection(model)
        names.discard(str(tied))
        option = "adapter.modules"
        fix = f"type {key(option, '[...]')} with names of its linear layers: {', '.join(sorted(names))}"
        if not self.modules:
            raise UserError("names no layer", fix, option, self.modules)
        for wanted in [self.modules] if isinstance(self.modules, str) else self.modules:
            if wanted == tied:
                raise UserError(
                    "shares its weights with the input embedding in this model (tie_word_embeddings), so an adapter on "
                    "it cannot be merged",
                    fix,
                    option,
                    wanted,
                )
            if wanted not in names:
                raise UserError(f"the model has no such linear layer{suggest(wanted, names)}", fix, option, wanted)


@dataclass(frozen=True)
class DoRA(LoRA):
    """Weight-decomposed LoRA: LoRA adapts the direction, the magnitude is trained separately (Liu et al. 2024)."""

    decompose: ClassVar[bool] = True


@dataclass(frozen=True)
class QLoRA(LoRA):
    """LoRA on a frozen base in 4 or 8 bits (Dettmers et al. 2023).

    Args:
        quantize: Format of the base: "nf4" (4-bit NormalFloat) or "int8" (LLM.int8).
        double_quant: Whether the block scales are quantised too (0.4 bits less per weight). nf4 only; None means yes
            for nf4.
    """

    quantize: Literal["nf4", "int8"] = "nf4"
    double_quant: bool | None = None

    def __post_init__(self) -> None:
        if self.quantize == "int8" and self.double_quant:
            raise UserError(
                "8-bit weights have no block scales that could be quantised",
                fix=f"type {key('adapter.double_quant', 'false')} or {key('adapter.quantize', 'nf4')}",
                option="adapter.double_quant",
                value="true",
            )

    def quantization_config(self, precision: Precision) -> BitsAndBytesConfig:
        """Return the quantisation config of the base; products are computed in the precision's compute format."""
        if self.quantize == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.double_quant is not False,
            bnb_4bit_compute_dtype=precision.compute,
        )

    def check_installed(self) -> None:
        """Test bitsandbytes on a few numbers.

        Raises:
            UserError: If bitsandbytes is missing or has no kernels for this machine.
        """
        check_bitsandbytes(self.quantize)

    def prepare(self, model: PreTrainedModel) -> None:
        """Make quantised layers compute the same in training mode and in eval mode."""
        disable_mode_dependence(model)

    def apply(self, model: PreTrainedModel) -> "PeftModel":
        """Return the model with a fresh LoRA adapter on quantised layers that compute the same in both modes."""
        self.prepare(model)
        return super().apply(model)


def tied_projection(model: PreTrainedModel) -> str | None:
    """Return the last part of the output projection's name if it shares the input embedding's weights, else None."""
    head = model.get_output_embeddings()
    # If the config ties them, loading the saved weights ties them again, whatever the files contain.
    shared = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if head is None or not (shared or head.weight is model.get_input_embeddings().weight):
        return None
    return next(name.rpartition(".")[2] for name, part in model.named_modules() if part is head)


def merge_adapter(model: "PeftModel", folder: Path) -> PreTrainedModel:
    """Return the model with the adapter that was stored in ``folder`` merged into its weights.

    Raises:
        UserError: If the adapter changes one of two embeddings that share their weights: merging would change both, or
            saving would lose the change.
    """
    from peft.utils import ModulesToSaveWrapper  # imported late: it takes seconds

    base: PreTrainedModel = model.get_base_model()
    tied = tied_projection(base)
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if tied is not None and any(is_tuner_layer(end) or isinstance(end, ModulesToSaveWrapper) for end in ends):
        raise UserError(
            f"its adapter changes the embedding or {tied}, which share their weights in this model "
            "(tie_word_embeddings), so it cannot be merged",
            fix="train the adapter on other layers",
            option="model.path",
            value=folder,
        )
    return model.merge_and_unload()  # type: ignore[operator,no-any-return]


def check_bitsandbytes(quantize: str) -> None:
    """Quantise and multiply a few numbers, to test before a model is loaded whether bitsandbytes runs on this machine.

    Raises:
        UserError: If it does not run, with the reason.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        import bitsandbytes

        kind = bitsandbytes.nn.Linear4bit if quantize == "nf4" else bitsandbytes.nn.Linear8bitLt
        options = {"quant_type": "nf4"} if quantize == "nf4" else {"has_fp16_weights": False}
        # Forked random state: this test must not consume the run's random numbers.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            layer = kind(64, 64, bias=False, **options).to(device)
            found = layer(torch.ones(1, 64, device=device, dtype=torch.float16 if device == "cuda" else torch.float32))
        works, reason = bool(torch.isfinite(found).all()), "it computes numbers that are not finite"
    except Exception as error:  # missing libraries, kernels and drivers raise many different types
        works, reason = False, first_line(error)
    if not works:
        raise UserError(
            f"bitsandbytes does not run on this machine ({device}: {reason})",
            fix=f"type {key('adapter', 'lora')}, or pip install --upgrade bitsandbytes",
            option="adapter",
            value="qlora",
        )


def missing_weights_error() -> UserError:
    """Return the error for an adapter on a quantised base whose weights would be random."""
    return UserError(
        "needs trained weights",
        fix=f"type {key('inputs.policy', 'RUN')} or {key('adapter', 'lora')}",
        option="adapter",
        value="qlora",
    )


def disable_mode_dependence(model: nn.Module) -> None:
    """Make quantised layers compute in eval mode exactly what they compute in training mode.

    4 bits: on CPUs with AVX512-BF16, bitsandbytes repacks the weights at the first forward without gradients and never
    unpacks them; from then on adapters silently get no gradient. 8 bits: on CPUs, eval mode rounds activations and
    training mode does not, so a policy would differ from its own reference and its own samples.
    """
    import bitsandbytes

    class Linear8bit(bitsandbytes.nn.Linear8bitLt):
        def train(self, mode: bool = True) -> "Linear8bit":
            return super().train(True)

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
        elif type(module) is bitsandbytes.nn.Linear8bitLt:
            module.__class__ = Linear8bit
            module.train()
