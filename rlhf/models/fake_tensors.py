"""Models on fake tensors: every shape and dtype without storage, so that a 70B model can be measured on any machine."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorConverter, FakeTensorMode
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.models.adapters import NoAdapter, missing_weights_error
from rlhf.models.model_source import ModelSource
from rlhf.models.precision import Precision
from rlhf.models.saving import plain_config
from rlhf.models.weight_casts import WeightCopy16
from rlhf.models.weights import use_weights

BLOCK = 64  # weights per block scale of NF4, as bitsandbytes quantises
NESTED = 256  # block scales per second-level scale, under double quantisation


class Nf4(nn.Linear):
    """Linear layer that reports the bytes of an NF4 layer and its block scales (Dettmers et al. 2023).

    ``nested`` quantises the block scales too.
    """

    nested = False

    def weight_bytes(self) -> int:
        """Return the bytes of the packed weights, of their scales, and of the code tables."""
        count = self.weight.numel()
        blocks = -(-count // BLOCK)
        scales = 4 * blocks
        if self.nested:  # scales in 8 bits, second-level scales and offset in fp32, and a table of 256 codes
            scales = blocks + 4 * -(-blocks // NESTED) + 4 + 4 * 256
        return -(-count // 2) + scales + 4 * 16


class DoubleNf4(Nf4):
    """NF4 layer whose block scales are quantised too (double quantisation)."""

    nested = True


class Int8(nn.Linear):
    """Linear layer that reports the bytes of an LLM.int8 layer."""

    def weight_bytes(self) -> int:
        """Return one byte per weight and one float32 scale per output."""
        return self.weight.numel() + 4 * self.out_features


class _Converter(FakeTensorConverter):
    """Converter that keeps no weak references to the tensors it makes.

    torch converts a module of fake tensors by swapping each tensor for a converted one, and refuses to swap a tensor
    with a weak reference.
    """

    def set_tensor_memo(self, t: Tensor, v: FakeTensor) -> None:
        """Do nothing."""


class _Mode(FakeTensorMode):
    """Fake-tensor mode whose modules can be converted and copied; a copy of a model keeps the same mode."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.fake_tensor_converter = _Converter()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Mode":
        return self


class FakeWeights:
    """Weight source of models on fake tensors: every shape and dtype, no storage, no values.

    Attributes:
        mode: Fake-tensor mode of all its models.
    """

    def __init__(self) -> None:
        self.mode = _Mode()

    def load(
        self,
        source: ModelSource,
        kind: Any,
        adapter: NoAdapter,
        precision: Precision,
        tokenizer: PreTrainedTokenizerBase,
    ) -> PreTrainedModel:
        """Build the layers of the model; of its files, only the configuration is read."""
        config = plain_config(source.config(tokenizer))
        text = config.get_text_config()
        text.vocab_size = max(text.vocab_size, len(tokenizer))  # a replaced chat template may add tokens
        if "SequenceClassification" in kind.__name__:
            config.num_labels = 1
        made: PreTrainedModel = kind.from_config(config, dtype=precision.weights, attn_implementation=source.attention)
        quantization_config = adapter.quantization_config(precision)
        if quantization_config is not None:
            if source.path is None:
                raise missing_weights_error()
            quantize(made, quantization_config)
        return made


@contextmanager
def use_fake_weights(weights: FakeWeights) -> Iterator[None]:
    """Build models on fake tensors inside the context.

    All construction goes through the constructors used in training, so the counted model is the trained model. Reading
    the value of a tensor made inside raises an error.
    """
    with use_weights(weights), weights.mode, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # copying a model does
        yield


def quantize(model: nn.Module, how: BitsAndBytesConfig) -> None:
    """Replace the layers that bitsandbytes would quantise by layers that report their quantised size."""
    kind = (DoubleNf4 if how.bnb_4bit_use_double_quant else Nf4) if how.load_in_4bit else Int8
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name.rpartition(".")[2] not in ("lm_head", "score"):
            packed = kind(module.in_features, module.out_features, module.bias is not None, device="meta")
            packed.weight, packed.bias = module.weight, module.bias
            model.set_submodule(name, packed.train(module.training))


def sizes(module: nn.Module, seen: set[int]) -> tuple[int, int, int]:
    """Return (parameters, trained parameters, bytes of parameters and buffers) of the tensors not in ``seen``.

    ``seen`` is extended by them. A weight that several modules share counts once; its 16-bit copy, if it is made
    (``kept_casts``), is included in the bytes.
    """
    parameters = trained = size = 0
    for part in module.modules():
        for name, value in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if id(value) in seen:
                continue
            seen.add(id(value))
            packed = isinstance(part, Nf4 | Int8) and name == "weight"
            size += part.weight_bytes() if packed else value.numel() * value.element_size()  # type: ignore[operator]
            copy: WeightCopy16 | None = getattr(value, "copy16", None)
            size += 0 if copy is None else copy.values.numel() * copy.values.element_size()
            if isinstance(value, nn.Parameter):
                parameters += value.numel()
                trained += value.numel() if value.requires_grad else 0
    return parameters, trained, size


def cast(module: nn.Module, trainer_precision: str) -> None:
    """Convert a module's weights to the format that Lightning's precision gives them before training."""
    if trainer_precision == "bf16-true":
        module.to(torch.bfloat16)
