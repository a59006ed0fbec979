"""Adapters: which weights are trained, and whether the frozen ones are quantised."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.errors import UserError, suggest
from rlhf.models.precision import Precision

TRAINED = "default"  # PEFT's name of the adapter that is trained; frozen ones below it have names of their own
NEEDS_WEIGHTS = "adapter=qlora needs trained weights: type inputs.policy=RUN or adapter=lora"


@dataclass(frozen=True)
class NoAdapter:
    """Every weight is trained."""

    def description(self, precision: Precision) -> BitsAndBytesConfig | None:
        """How the base is quantised, None for not at all; not tried out, so that models without weights have it too."""
        return None

    def quantization(self, precision: Precision) -> BitsAndBytesConfig | None:
        """The same for a base that is about to be loaded."""
        return self.description(precision)

    def prepare(self, model: PreTrainedModel) -> None:
        """Makes a loaded base fit to be adapted."""

    def apply(self, model: PreTrainedModel) -> PreTrainedModel | PeftModel:
        """The model with the adapter on it."""
        return model


@dataclass(frozen=True)
class LoRA(NoAdapter):
    """Low-rank adaptation: W + (alpha / rank) B A, with B = 0 at the start (Hu et al. 2021, eq. 3).

    Args:
        rank: Rank r of the update.
        alpha: Scale of the update; it is multiplied by alpha / rank.
        dropout: Dropout on the adapter's input, in [0, 1).
        modules: Names of the linear layers adapted, or "all-linear" for all but the output projection.
        shared_base: Whether all roles of a stage (policy, reference, value and reward model) are adapters on one copy
            of the base weights (``rlhf.models.shared_base``), where each would else hold weights of its own.
    """

    rank: Annotated[int, Field(gt=0)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    modules: str | list[str] = "all-linear"
    shared_base: bool = False

    decompose: ClassVar[bool] = False

    def apply(self, model: PreTrainedModel) -> PeftModel:
        """The model with its weights frozen and a fresh adapter on it, equal to the model itself at first."""
        return get_peft_model(model, self.config(model), adapter_name=TRAINED)

    def config(self, model: PreTrainedModel) -> LoraConfig:
        """PEFT's description of the adapter.

        Raises:
            UserError: If the model has no linear layers of the names asked for.
        """
        modules: str | list[str] = "all-linear"
        if self.modules != "all-linear":
            modules = [self.modules] if isinstance(self.modules, str) else list(self.modules)
            self._check_modules(model, modules)
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # any number works; PEFT's annotation says int
            lora_dropout=self.dropout,
            target_modules=modules,
            use_dora=self.decompose,
            bias="none",
            task_type="CAUSAL_LM" if model.get_output_embeddings() is not None else None,
        )

    @staticmethod
    def _check_modules(model: PreTrainedModel, modules: list[str]) -> None:
        linear = (nn.Linear, Conv1D)  # GPT-2 writes its linear layers as convolutions
        names = {name.rsplit(".", 1)[-1] for name, part in model.named_modules() if isinstance(part, linear)}
        for wanted in modules:
            if wanted not in names:
                raise UserError(
                    f"adapter.modules={wanted}: the model has no such linear layer{suggest(wanted, names)}; type "
                    f"adapter.modules=[...] of those it has: {', '.join(sorted(names))}"
                )


@dataclass(frozen=True)
class DoRA(LoRA):
    """Weight-decomposed LoRA: the direction is adapted by LoRA, the magnitude is trained apart (Liu et al. 2024)."""

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
            raise UserError("adapter.double_quant=true needs adapter.quantize=nf4; leave one of them out")

    def description(self, precision: Precision) -> BitsAndBytesConfig:
        """How the base is quantised; products are computed in the precision's format."""
        if self.quantize == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.double_quant is not False,
            bnb_4bit_compute_dtype=precision.compute,
        )

    def quantization(self, precision: Precision) -> BitsAndBytesConfig:
        """The same, tried out first on a few numbers.

        Raises:
            UserError: Where bitsandbytes is missing, or has no kernels for this machine.
        """
        check_bitsandbytes(self.quantize)
        return self.description(precision)

    def prepare(self, model: PreTrainedModel) -> None:
        """Quantised layers compute the same whether they train or not."""
        make_exact(model)

    def apply(self, model: PreTrainedModel) -> PeftModel:
        """As LoRA, on quantised layers that compute the same whether they train or not."""
        self.prepare(model)
        return super().apply(model)


def check_bitsandbytes(quantize: str) -> None:
    """Quantises and multiplies a few numbers, to find out before a model is loaded whether that works here.

    Raises:
        UserError: If it does not, with the reason.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        import bitsandbytes

        kind = bitsandbytes.nn.Linear4bit if quantize == "nf4" else bitsandbytes.nn.Linear8bitLt
        options = {"quant_type": "nf4"} if quantize == "nf4" else {"has_fp16_weights": False}
        # A generator of its own: nothing else may draw from the run's randomness.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            layer = kind(64, 64, bias=False, **options).to(device)
            found = layer(torch.ones(1, 64, device=device, dtype=torch.float16 if device == "cuda" else torch.float32))
        works, reason = bool(torch.isfinite(found).all()), "it computes numbers that are not finite"
    except Exception as error:  # missing libraries, kernels and drivers all raise types of their own
        works, reason = False, (str(error).strip() or type(error).__name__).splitlines()[0]
    if not works:
        raise UserError(
            f"adapter=qlora: bitsandbytes does not run on this machine ({device}: {reason}); type adapter=lora, or "
            "pip install --upgrade bitsandbytes"
        )


def make_exact(model: nn.Module) -> None:
    """Makes quantised layers compute in eval mode what they compute in training.

    4 bits: on CPUs with AVX512-BF16, bitsandbytes repacks the weights at the first forward without gradients and never
    unpacks them: from then on adapters get no gradient, silently. 8 bits: on CPUs, eval mode rounds activations and
    train mode does not: a policy would differ from its own reference and its own samples.
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
