"""Weighted mixture of several sources."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from rlhf.data.data import Data
from rlhf.data.disk import Chain, View
from rlhf.data.load_report import LoadReport
from rlhf.data.records import Record
from rlhf.data.split import Split
from rlhf.errors import UserError, key, renaming, suggest


class Mixture(Data):
    """Data that mix records of one type from several parts, in a random order drawn from the seed.

    A mixture streams if one of its parts does.

    Args:
        parts: Sources by name, all of one record type. max_length and similar options are the first part's.
        weights: Relative share of each part in the training records, by name.
        size: Number of training records; a part smaller than its share is repeated in another order. None: each record
            of the first part once, and as many of the others as their weights require.
        seed: Seed of the draws.
    """

    def __init__(
        self,
        parts: dict[str, Data],
        weights: dict[str, Annotated[float, Field(gt=0)]],
        size: Annotated[int, Field(gt=0)] | None,
        seed: int = 0,
    ) -> None:
        self.parts, self.weights, self.count = dict(parts), dict(weights), size
        self.check_hyperparameters(parts, weights)
        first = next(iter(self.parts.values()))
        kinds = {part.record for part in self.parts.values()}
        if len(kinds) != 1:
            raise UserError(
                f"must have one record type, has {', '.join(sorted(kinds))}",
                fix=f"type {key('data.parts.NAME.record', first.record)}",
                option="data.parts",
            )
        super().__init__(
            record=first.record,
            source=" + ".join(part.source for part in self.parts.values()),
            size=size,
            validation=0,
            max_length=first.max_length,
            max_prompt_length=first.max_prompt_length,
            seed=seed,
            streaming=any(part.streaming for part in self.parts.values()),
        )

    @staticmethod
    def check_hyperparameters(parts: Mapping[str, Any], weights: Mapping[str, float], **_: Any) -> None:  # type: ignore[override]
        """Validate the names alone.

        Raises:
            UserError: If parts and weights have different names.
        """
        for name in weights:
            if name not in parts:
                raise UserError(f"no such part{suggest(name, parts)}", option=f"data.weights.{name}")
        for name in parts:
            if name not in weights:
                raise UserError(
                    "has no weight", fix=f"type {key(f'data.weights.{name}', 1)}", option=f"data.parts.{name}"
                )

    def digest(self) -> str:
        """Return the sha256 of the parts' digests."""
        parts = {}
        for name, part in self.parts.items():
            with renaming("data", f"data.parts.{name}"):
                parts[name] = part.digest()
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def place(self, record: Record) -> str:
        """Return the place of a record as ``Data.place``, from the first part that has it."""
        return next((found for part in self.parts.values() if (found := part.place(record))), "")

    def load(self) -> Split:
        """Load `size` training records by weight; everything that any part holds out is held out."""
        total = sum(self.weights.values())
        rng = random.Random(f"mixture/{self.seed}")
        report = LoadReport(source=self.source)
        parts: list[Sequence[Any]] = []
        places: list[int] = []  # indices into the concatenation of all parts
        validation: list[Sequence[Any]] = []
        count = self.count
        for name, part in self.parts.items():
            with renaming("data", f"data.parts.{name}"):
                split = part.load()
            if count is None:  # the first part
                count = round(len(split.train) * total / self.weights[name])
            wanted = round(count * self.weights[name] / total)
            first = sum(map(len, parts))
            drawn: list[int] = []
            while len(drawn) < wanted:
                own = range(first, first + len(split.train))
                drawn += rng.sample(own, min(wanted - len(drawn), len(own)))
            places += drawn
            parts.append(split.train)
            validation.append(split.validation)
            report.read += split.report.read
            report.kept += split.report.kept
            report.ties += split.report.ties
            report.unwanted += split.report.unwanted
            report.bad += split.report.bad
            report.split = report.split or split.report.split
        rng.shuffle(places)
        train, held_out = View(Chain(parts), places), Chain(validation)
        report.train, report.validation = len(train), len(held_out)
        if self.streaming:
            return Split(train, held_out, report, self)
        return Split(list(train), list(held_out), report, self)
