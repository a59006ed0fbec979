"""Embeddings of prompts, for objectives that read the similarity of prompts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from rlhf.data.collate import collate_prompts
from rlhf.data.encoded_rows import EncodedComparison, EncodedLabel
from rlhf.errors import UserError, first_line, key
from rlhf.functional.masking import last_index
from rlhf.models.language_model import LanguageModel
from rlhf.models.reference import Reference
from rlhf.stage.experience import chunks

E = TypeVar("E", EncodedComparison, EncodedLabel)


@torch.no_grad()
def embed_prompts(
    examples: Sequence[E],
    reference: Reference | None,
    policy: LanguageModel,
    pooling: str,
    encoder: str | None,
    batch_size: int,
) -> list[E]:
    """Return the comparisons, or labels, with an embedding [E] of each prompt, on the CPU.

    Args:
        examples: Encoded comparisons or labels.
        reference: The frozen model whose last hidden states are pooled.
        policy: The model whose tokenizer encoded the prompts.
        pooling: ``mean`` over the prompt's tokens, or its ``last`` one.
        encoder: Directory or hub id of a model that reads the prompt's text instead; null: the reference.
        batch_size: Prompts per batch.
    """
    assert reference is not None
    embed = (
        _EncoderEmbedding(encoder, policy)
        if encoder is not None
        else _ReferenceEmbedding(reference.to(policy.device), policy)
    )
    done: list[E] = []
    for rows in chunks(len(examples), batch_size):
        chosen = examples[rows]
        hidden, mask = embed([list(example.prompt) for example in chosen])
        vectors = pooled(hidden.float(), mask.bool(), pooling).cpu()
        done += [replace(example, embedding=vector) for example, vector in zip(chosen, vectors, strict=True)]
    return done


def pooled(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Pool hidden states [B, T, E] under their mask [B, T] to one vector per row, [B, E]; padding is excluded."""
    if pooling == "last":
        return hidden[torch.arange(len(hidden)), last_index(mask)]
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1)


class _ReferenceEmbedding:
    """Embedding by the reference, which reads the policy's tokens."""

    def __init__(self, reference: Reference, policy: LanguageModel) -> None:
        self.reference, self.policy = reference, policy

    def __call__(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        batch = collate_prompts(prompts, self.policy.pad_id).to(self.policy.device)
        with self.reference.active() as model:
            return model.hidden(batch), batch.attention_mask


class _EncoderEmbedding:
    """Embedding by another model, which reads the prompts' text without the template's special tokens."""

    def __init__(self, path: str, policy: LanguageModel) -> None:
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            self.model: Any = AutoModel.from_pretrained(path, trust_remote_code=False).eval().to(policy.device)
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot be read ({first_line(error)})",
                fix=f"type a model directory or hub id, or {key('objective.encoder', None)} for the reference",
                option="objective.encoder",
                value=path,
            ) from error
        self.policy = policy
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def __call__(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        texts = self.policy.tokenizer.batch_decode(prompts, skip_special_tokens=True)
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, truncation=True).to(self.policy.device)
        batch.pop("token_type_ids", None)
        return self.model(**batch).last_hidden_state, batch["attention_mask"]
