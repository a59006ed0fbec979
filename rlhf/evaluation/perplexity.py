"""Likelihood of given text under a policy: nats per token, perplexity and bits per byte."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhf.data.collate import collate
from rlhf.data.encoded_rows import Encoded
from rlhf.data.encoding import encode_dialogue, encode_text
from rlhf.data.records import Demonstration, Text
from rlhf.models.language_model import LanguageModel

TOKENS = 8192  # per batch, padding included: bounds memory for any lengths


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of each document (nats), with the tokens and bytes that it covers."""

    nats: list[float]
    tokens: list[int]
    bytes: list[int]
    cut: int = 0  # dialogues truncated at the end of the context

    def loss(self) -> list[float]:
        """Return one number per document, whose mean is the loss in nats per token over all documents.

        Linearized as in ``perplexity``.
        """
        rate = math.fsum(self.nats) / max(1, sum(self.tokens))
        return _linear(self.nats, self.tokens, rate, slope=1.0)

    def perplexity(self) -> list[float]:
        """Return one number per document, whose mean is the perplexity and whose standard error is the perplexity's.

        Perplexity is a function of a ratio of sums; these are its linearization at the sample (delta method), so that
        means, errors and paired differences are computed as for any other metric.
        """
        rate = math.fsum(self.nats) / max(1, sum(self.tokens))
        return _linear(self.nats, self.tokens, math.exp(rate), slope=math.exp(rate))

    def bits_per_byte(self) -> list[float]:
        """Return one number per document, whose mean is the bits per byte of the text.

        Linearized as in ``perplexity``. Comparable between models with different tokenizers.
        """
        rate = math.fsum(self.nats) / max(1, sum(self.bytes))
        return _linear(self.nats, self.bytes, rate / math.log(2), slope=1 / math.log(2))


def _linear(total: Sequence[float], count: Sequence[int], value: float, slope: float) -> list[float]:
    """Return value + slope * (each document's effect on the ratio sum(total) / sum(count))."""
    if not count:
        return []
    rate, mean = math.fsum(total) / max(1, sum(count)), max(1, sum(count)) / len(count)
    return [value + slope * (x - rate * n) / mean for x, n in zip(total, count, strict=True)]


def text_likelihood(policy: LanguageModel, documents: Sequence[Text]) -> Likelihood:
    """Return the likelihood of plain text as it is trained on: `encode_text`, end-of-text included.

    Every token but a document's first is predicted once. A document longer than the context is read in windows, each of
    which begins with the last token of the one before (`Encoded.windows`, which training uses too).
    """
    rows = [
        (number, window)
        for number, document in enumerate(documents)
        for window in encode_text(policy.tokenizer, document.text).windows(policy.context_length)
    ]
    return _likelihood(policy, rows, [len(document.text.encode()) for document in documents])


def response_likelihood(policy: LanguageModel, dialogues: Sequence[Demonstration]) -> Likelihood:
    """Return the likelihood of the assistant's turns in dialogues, as they are trained on: end of turn included.

    A last turn that was cut off has no end of turn. Dialogues longer than the context are truncated at its end.
    """
    rows, sizes, cut = [], [], 0
    for number, dialogue in enumerate(dialogues):
        whole = encode_dialogue(policy.tokenizer, dialogue.messages, ended=dialogue.ended)
        row = Encoded(whole.ids[: policy.context_length], whole.mask[: policy.context_length])
        cut += len(row) < len(whole)
        share = sum(row.mask) / max(1, sum(whole.mask))
        response_bytes = sum(len(turn.content.encode()) for turn in dialogue.messages if turn.role == "assistant")
        rows.append((number, row))
        sizes.append(round(share * response_bytes))
    return _likelihood(policy, rows, sizes, cut)


@torch.no_grad()
def _likelihood(
    policy: LanguageModel, rows: Sequence[tuple[int, Encoded]], sizes: list[int], cut: int = 0
) -> Likelihood:
    nats, tokens = [0.0] * len(sizes), [0] * len(sizes)
    ordered = sorted(rows, key=lambda row: len(row[1]))
    start = 0
    while start < len(ordered):
        stop = start + 1
        while stop < len(ordered) and (stop + 1 - start) * len(ordered[stop][1]) <= TOKENS:
            stop += 1
        part = ordered[start:stop]
        batch = collate([row for _, row in part], policy.pad_id).to(policy.device)
        logp, _ = policy.logprobs(batch)
        counts = batch.loss_mask.clone()
        counts[:, 0] = False
        for (number, _), value, count in zip(part, logp.sum(dim=1).tolist(), counts.sum(dim=1).tolist(), strict=True):
            nats[number] -= value
            tokens[number] += count
        start = stop
    return Likelihood(nats, tokens, sizes, cut)
