"""Several sources as one, mixed by weights."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from rlhf.data.data import Data, LoadReport, Split
from rlhf.data.disk import Chain, View
from rlhf.data.records import Record
from rlhf.errors import UserError, suggest


class Mixture(Data):
    """Takes the place of a Data: records of one type from several parts, in a random order drawn from the seed.

    It streams if one of its parts does.

    Arguments:
        parts: the sources, by name; all of one record type. max_length and the like are the first part's.
        weights: how much of the training records comes from each part, by name; only their ratios count.
        size: records to train on; a part smaller than its share is gone through again in another order. None: each
            record of the first part once, and of the others what their weights ask for.
        seed: of the draws.
    """

    def __init__(
        self,
        parts: dict[str, Data],
        weights: dict[str, Annotated[float, Field(gt=0)]],
        size: Annotated[int, Field(gt=0)] | None,
        seed: int = 0,
    ) -> None:
        self.parts, self.weights, self.count = dict(parts), dict(weights), size
        self.check_knobs(parts, weights)
        kinds = {part.record for part in self.parts.values()}
        if len(kinds) != 1:
            raise UserError(
                f"data.parts are of different record types ({', '.join(sorted(kinds))}); set data.parts.NAME.record"
            )
        first = next(iter(self.parts.values()))
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
    def check_knobs(parts: Mapping[str, Any], weights: Mapping[str, float], **_: Any) -> None:  # type: ignore[override]
        """What can be told from the names alone. Raises UserError for parts and weights of different names."""
        for name in weights:
            if name not in parts:
                raise UserError(f"data.weights.{name}: no such part{suggest(name, parts, 'data.weights.')}")
        for name in parts:
            if name not in weights:
                raise UserError(f"data.parts.{name} has no weight; type data.weights.{name}=1")

    def digest(self) -> str:
        """sha256 over the parts' digests."""
        parts = {name: part.digest() for name, part in self.parts.items()}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def place(self, record: Record) -> str:
        """As of a Data, in whichever part has the record."""
        return next((found for part in self.parts.values() if (found := part.place(record))), "")

    def load(self) -> Split:
        """`size` training records by weight; all that any part holds out is held out."""
        total = sum(self.weights.values())
        rng = random.Random(f"mixture/{self.seed}")
        report = LoadReport(source=self.source)
        parts: list[Sequence[Any]] = []
        places: list[int] = []  # in all parts, one after the other
        validation: list[Sequence[Any]] = []
        count = self.count
        for name, part in self.parts.items():
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
