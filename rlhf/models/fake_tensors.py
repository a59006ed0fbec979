"""Models on fake tensors: every shape and dtype without storage, so that a 70B model can be measured on any machine."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BitsAndBytesConfig, PreTrainedModel

from rlhf.errors import UserError
from rlhf.models.adapters import NEEDS_WEIGHTS
from rlhf.models.causal_lm import CausalLM
from rlhf.models.language_model import LanguageModel, plain_config

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


class FakeWeights(FakeTensorMode):
    """Fake-tensor mode: tensors made under it have a shape and no content; copies of a model keep the same mode."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FakeWeights":
        return self


@contextmanager
def fake_weights(mode: FakeWeights) -> Iterator[None]:
    """Build models on fake tensors (shapes and dtypes, no storage) inside the context.

    All construction goes through the constructors used in training, so the counted model is the trained model. Reading
    the value of a tensor made inside raises an error.
    """
    changed: list[tuple[type, str, Any]] = [
        (CausalLM, "_weights", _weights),
        (LanguageModel, "check_head", lambda self: None),  # it compares logits, which have no values here
        (nn.Module, "_apply", _converting()),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in changed]
    for owner, name, replacement in changed:
        setattr(owner, name, replacement)
    try:
        with mode, warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Accessing the data pointer of FakeTensor"
            )  # copying a model does
            yield
    finally:
        for owner, name, own in kept:
            setattr(owner, name, own)


def _weights(spec: CausalLM, kind: Any, adapter: Any, precision: Any, tokenizer: Any) -> PreTrainedModel:
    """Build the layers without values; replaces ``CausalLM._weights``."""
    config = plain_config(spec.config(tokenizer))
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, len(tokenizer))  # a replaced chat template may add tokens
    if "SequenceClassification" in kind.__name__:
        config.num_labels = 1
    made: PreTrainedModel = kind.from_config(config, dtype=precision.weights, attn_implementation=spec.attention)
    quantization = adapter.description(precision)
    if quantization is not None:
        if spec.path is None:
            raise UserError(NEEDS_WEIGHTS)
        quantize(made, quantization)
    return made


def _converting() -> Any:
    """Return a replacement of ``nn.Module._apply``, which swaps tensor storage in a way that fake tensors refuse."""
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # tied weights stay tied

    def apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        for child in self.children() if recurse else ():
            child._apply(fn)
        for name, own in self._parameters.items():
            if own is not None and (changed := fn(own.detach())).dtype != own.dtype:
                new = made.setdefault(id(own), (own, nn.Parameter(changed, own.requires_grad)))[1]
                self._parameters[name] = new
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else fn(buffer)
        return self

    return apply


def quantize(model: nn.Module, how: BitsAndBytesConfig) -> None:
    """Replace the layers that bitsandbytes would quantise by layers that report their quantised size."""
    nf4 = DoubleNf4 if how.bnb_4bit_use_double_quant else Nf4
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name.rpartition(".")[2] not in ("lm_head", "score"):
            module.__class__ = nf4 if how.load_in_4bit else Int8


def sizes(module: nn.Module, seen: set[int]) -> tuple[int, int, int]:
    """Return (parameters, trained parameters, bytes of parameters and buffers) of the tensors not in ``seen``.

    ``seen`` is extended by them. A weight that several modules share counts once.
    """
    parameters = trained = size = 0
    for part in module.modules():
        for name, value in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if id(value) in seen:
                continue
            seen.add(id(value))
            packed = isinstance(part, Nf4 | Int8) and name == "weight"
            size += part.weight_bytes() if packed else value.numel() * value.element_size()  # type: ignore[operator]
            if isinstance(value, nn.Parameter):
                parameters += value.numel()
                trained += value.numel() if value.requires_grad else 0
    return parameters, trained, size


def cast(module: nn.Module, trainer_precision: str) -> None:
    """Convert a module's weights to the format that Lightning's precision gives them before training."""
    if trainer_precision == "bf16-true":
        module.to(torch.bfloat16)
