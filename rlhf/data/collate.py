"""Collation of tokens to tensors. Shapes: B rows, T tokens, P pairs, R unique responses (one row each)."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from random import Random
from typing import Literal, Self

import torch
from torch import Tensor

from rlhf.data.encoded_rows import Encoded, EncodedComparison, EncodedLabel
from rlhf.data.records import GRADES
from rlhf.errors import UserError, key


class TensorDataclass:
    """Mixin with `.to(device)` for frozen dataclasses of tensors, nested ones included."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return a copy with all tensors on ``device``; other fields are unchanged."""
        moved = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                value = value.to(device, non_blocking=non_blocking)
            elif isinstance(value, TensorDataclass):
                value = value.to(device, non_blocking)
            moved[field.name] = value
        return type(self)(**moved)


@dataclass(frozen=True)
class TokenBatch(TensorDataclass):
    """Rows of tokens. In all masks True selects a token."""

    ids: Tensor  # [B, T] long
    attention_mask: Tensor  # [B, T] bool, False on padding
    loss_mask: Tensor  # [B, T] bool, True where ids[b, t] is a target; never at a document's first token
    position_ids: Tensor  # [B, T] long, from 0 at each document's first token; 0 on padding

    @classmethod
    def of(
        cls,
        ids: Tensor,
        attention_mask: Tensor,
        loss_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> "TokenBatch":
        """Build a batch of unpacked rows.

        Args:
            ids: Token ids, [B, T] long.
            attention_mask: 1 on tokens, 0 on padding on either side, [B, T].
            loss_mask: 1 on the target tokens, [B, T]; None selects none.
            position_ids: Positions in the row, [B, T] long; None counts the attended tokens.
        """
        mask = attention_mask.bool()
        if position_ids is None:
            position_ids = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        return cls(ids, mask, torch.zeros_like(mask) if loss_mask is None else loss_mask.bool(), position_ids)

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> "TokenBatch":
        return TokenBatch(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True)
class PairBatch(TensorDataclass):
    """Comparisons, with each response as one row however many pairs it is in."""

    tokens: TokenBatch  # R rows of prompt + response, loss_mask on the response
    chosen: Tensor  # [P] long, row of the better response
    rejected: Tensor  # [P] long, row of the worse response
    grade: Tensor  # [P] long, index into GRADES, -1 where unknown
    weight: Tensor  # [P] float, 1 / number of pairs of its comparison: they sum to the number of comparisons
    prompt_index: Tensor  # [P] long, equal for pairs of the same prompt, across records, batches and ranks
    scores: Tensor | None  # [R] float, or None unless every response has one
    reference: Tensor | None = None  # [R] float, reference log-probability of each response, or None
    embedding: Tensor | None = None  # [P, E] float, a vector of each pair's prompt, or None
    unsafe: Tensor | None = None  # [R] long, 1 where a response does harm, 0 where not, -1 where unlabelled

    def __len__(self) -> int:
        return self.chosen.shape[0]


@dataclass(frozen=True)
class LabelBatch(TensorDataclass):
    """Unpaired responses."""

    tokens: TokenBatch  # B rows of prompt + response, loss_mask on the response
    desirable: Tensor  # [B] bool
    mismatched: TokenBatch | None  # M <= B rows of a prompt + the response to another one, None if there are none
    reference: Tensor | None = None  # [B] float, reference log-probability of each response, or None
    mismatched_reference: Tensor | None = None  # [M] float
    embedding: Tensor | None = None  # [B, E] float, a vector of each prompt, or None

    def __len__(self) -> int:
        return self.desirable.shape[0]


def collate(rows: Sequence[Encoded], pad_id: int, side: Literal["left", "right"] = "right") -> TokenBatch:
    """Pad rows to the longest of them.

    Masks come from positions, never from a comparison of ids with pad_id.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("collate: no rows")
    length = max(len(row) for row in rows)
    shape = (len(rows), length)
    ids = torch.full(shape, pad_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.bool)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    position_ids = torch.zeros(shape, dtype=torch.long)
    for index, row in enumerate(rows):
        n = len(row)
        place = slice(0, n) if side == "right" else slice(length - n, length)
        ids[index, place] = torch.tensor(row.ids, dtype=torch.long)
        attention_mask[index, place] = True
        positions = torch.arange(n) if row.positions is None else torch.tensor(row.positions, dtype=torch.long)
        position_ids[index, place] = positions
        # No token of its own document precedes a first token, so none can predict it.
        loss_mask[index, place] = torch.tensor(row.mask, dtype=torch.bool) & (positions > 0)
    return TokenBatch(ids, attention_mask, loss_mask, position_ids)


def collate_prompts(prompts: Sequence[Sequence[int]], pad_id: int) -> TokenBatch:
    """Pad prompts for generation on the left, so that every row ends where its response begins."""
    return collate([Encoded(list(ids), [False] * len(ids)) for ids in prompts], pad_id, side="left")


def _row(prompt: list[int], response: list[int]) -> Encoded:
    return Encoded(prompt + response, [False] * len(prompt) + [True] * len(response))


def collate_comparisons(comparisons: Sequence[EncodedComparison], pad_id: int) -> PairBatch:
    """Collate all pairs of every comparison over rows of unique responses (InstructGPT, 2203.02155, section 3.5).

    Raises:
        UserError: If the comparisons have no pair.
    """
    rows: list[Encoded] = []
    pairs: list[tuple[int, int, int, float, int]] = []
    scores: list[float] = []
    reference: list[float] = []
    embeddings: list[Tensor] = []
    unsafe: list[int] = []
    for item in comparisons:
        prompt = prompt_hash(item.prompt)
        place = {response: len(rows) + offset for offset, response in enumerate(item.used)}
        rows += [_row(item.prompt, item.responses[response]) for response in item.used]
        if item.scores is not None:
            scores += [item.scores[response] for response in item.used]
        unsafe += [int(item.unsafe[response]) if item.unsafe else -1 for response in item.used]
        if item.reference is not None:
            reference += [item.reference[response] for response in item.used]
        for better, worse, grade in item.pairs:
            code = -1 if grade is None else GRADES.index(grade)
            pairs.append((place[better], place[worse], code, 1.0 / len(item.pairs), prompt))
            if item.embedding is not None:
                embeddings.append(item.embedding)
    if not pairs:
        raise UserError(
            "all comparisons of a batch are ties or have identical responses",
            fix="remove such records from the data",
        )
    chosen, rejected, grades, weight, prompt_index = zip(*pairs, strict=True)
    return PairBatch(
        tokens=collate(rows, pad_id),
        chosen=torch.tensor(chosen, dtype=torch.long),
        rejected=torch.tensor(rejected, dtype=torch.long),
        grade=torch.tensor(grades, dtype=torch.long),
        weight=torch.tensor(weight, dtype=torch.float32),
        prompt_index=torch.tensor(prompt_index, dtype=torch.long),
        scores=torch.tensor(scores, dtype=torch.float32) if len(scores) == len(rows) else None,
        reference=torch.tensor(reference, dtype=torch.float32) if len(reference) == len(rows) else None,
        embedding=torch.stack(embeddings) if len(embeddings) == len(pairs) else None,
        unsafe=torch.tensor(unsafe, dtype=torch.long),
    )


def prompt_hash(prompt: Sequence[int]) -> int:
    """Return a number that depends on the prompt's tokens alone: 63 bits of their hash.

    With numbers by record, one prompt in two records would count as two prompts, and the response of one record would
    become a negative of itself.
    """
    tokens = array("q", prompt).tobytes()
    return int.from_bytes(hashlib.blake2b(tokens, digest_size=8).digest(), "little") >> 1


def collate_labels(labels: Sequence[EncodedLabel], pad_id: int) -> LabelBatch:
    """Collate unpaired responses, and the prompts of those that have a mismatched response with that response."""
    others = [(label.prompt, label.mismatched) for label in labels if label.mismatched is not None]
    reference = [label.reference for label in labels if label.reference is not None]
    mismatched = [label.mismatched_reference for label in labels if label.mismatched_reference is not None]
    embeddings = [label.embedding for label in labels if label.embedding is not None]
    return LabelBatch(
        tokens=collate([_row(label.prompt, label.response) for label in labels], pad_id),
        desirable=torch.tensor([label.desirable for label in labels], dtype=torch.bool),
        mismatched=collate([_row(*other) for other in others], pad_id) if others else None,
        reference=torch.tensor(reference, dtype=torch.float32) if len(reference) == len(labels) else None,
        mismatched_reference=torch.tensor(mismatched, dtype=torch.float32) if len(mismatched) == len(others) else None,
        embedding=torch.stack(embeddings) if len(embeddings) == len(labels) else None,
    )


def add_mismatched_responses(
    labels: Sequence[EncodedLabel], longest: int, tries: int = 64, seed: int = 0
) -> list[EncodedLabel]:
    """Return the labels, each with the response of a random row that has another prompt as its mismatched response.

    The choice is random because the KL estimate is an expectation over all responses (2402.01306), and because data are
    ordered: a comparison's responses are best first. It is drawn from (seed, row) alone, once for the whole data set
    rather than within a batch. So neither micro-batches nor ranks nor a resume change the estimate, and the reference
    model evaluates each mismatched response once. A label keeps None if none of `tries` rows drawn (all rows, if there
    are no more) has another prompt and fits `longest` tokens.

    Args:
        labels: Encoded labels of the whole data set.
        longest: Most tokens of prompt and mismatched response together.
        tries: Most rows drawn for each label.
        seed: Seed of the draws.
    """
    done = []
    for index, label in enumerate(labels):
        drawn = islice(_shuffled(len(labels), Random(f"mismatched reply/{seed}/{index}")), tries)
        fitting = (
            other.response
            for other in map(labels.__getitem__, drawn)
            if other.prompt != label.prompt and len(label.prompt) + len(other.response) <= longest
        )
        done.append(replace(label, mismatched=next(fitting, None)))
    return done


def _shuffled(n: int, rng: Random) -> Iterator[int]:
    """Yield 0 to n - 1 in random order, drawing only as far as it is read (Fisher and Yates)."""
    moved: dict[int, int] = {}
    for place in range(n):
        drawn = rng.randrange(place, n)
        yield moved.get(drawn, drawn)
        moved[drawn] = moved.get(place, place)


def pack(documents: Iterable[Encoded], length: int) -> list[Encoded]:
    """Return the rows of `packed` as a list."""
    return list(packed(documents, length))


def packed(documents: Iterable[Encoded], length: int) -> Iterator[Encoded]:
    """Yield rows of at most `length` tokens with several documents each, in order, for padding-free batches.

    Positions restart at each document. A document is moved to the next row rather than cut, unless it is longer than a
    row. Then it is cut into windows (`Encoded.windows`) that share a token, so that every token but a document's first
    is a target wherever it is cut. Attention must be per document: the models of this project derive it from the
    positions.

    Raises:
        UserError: For a length below 2, at which no row has a target.
    """
    if length < 2:
        raise UserError(
            "must be at least 2, because a row of one token has no target",
            fix=f"type {key('stage.packing', 2)} or more",
            option="stage.packing",
            value=length,
        )
    ids: list[int] = []
    mask: list[bool] = []
    positions: list[int] = []
    for document in documents:
        for piece in document.windows(length):
            if ids and len(ids) + len(piece) > length:
                yield Encoded(ids, mask, positions)
                ids, mask, positions = [], [], []
            ids += piece.ids
            mask += [False, *piece.mask[1:]]  # a first token has no predecessor
            positions += range(len(piece))
    if ids:
        yield Encoded(ids, mask, positions)
