"""Selection of held-out records by the hash of their prompts. The import needs no numpy."""

import hashlib
from array import array
from collections.abc import Sequence
from typing import Any

from rlhf.data.records import Record, prompt_text
from rlhf.errors import UserError

HELD_OUT = 400  # prompts of the testbed for data.validation=null: a standard error of 1/20 of the spread
HELD_OUT_SHARE = 0.1  # of anything else, demonstrations and comparisons alike: one file has one held-out part

SEARCHED = 1_000_000  # limit of the search for the held-out part, in sums of groups


class TooFewHeldOut(UserError):
    """Error for a testbed that holds out fewer different prompts than requested.

    Attributes:
        available: Number of different prompts that it holds out.
    """

    def __init__(
        self,
        problem: str,
        fix: str = "",
        option: str = "data.validation",
        value: Any = ...,
        where: str = "",
        available: int = 0,
    ) -> None:
        super().__init__(problem, fix, option, value, where)
        self.available = available


def select_held_out(records: Sequence[Record], wanted: int, seed: int) -> tuple["array[int]", "array[int]", str]:
    """Return the indices of training and of held-out records, both in order, and a note.

    Records are selected by the hash of their prompts. Those with the same prompt stay on one side, so `wanted` is met
    as closely as whole prompts allow; where it is not met, the note says why (else "").
    """
    import numpy as np

    keys = np.fromiter((prompt_key(record, seed) for record in records), np.uint64, len(records))
    known, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    chosen = nearest_groups(counts.tolist(), wanted)
    note = _split_note(wanted, counts.tolist(), chosen) if sum(counts[chosen]) != wanted else ""
    side = np.zeros(len(known), bool)
    side[chosen] = True
    out = side[inverse]
    train, held_out = (array("Q", np.flatnonzero(part).astype(np.uint64).tobytes()) for part in (~out, out))
    return train, held_out, note


def prompt_key(record: Record, seed: int) -> int:
    """Return 64 bits of the hash of a record's prompt and the seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}\x1e{prompt_text(record)}".encode()).digest()[:8])


def nearest_groups(sizes: Sequence[int], wanted: int) -> list[int]:
    """Return the indices of groups whose sizes sum as closely to `wanted` as possible, never all groups.

    Groups are taken in order as long as their sum does not exceed `wanted`; with many small groups this meets it
    exactly. Otherwise the nearest sum is searched for, the smaller of two equally near ones. The search is skipped
    where it would take long, for very many groups.
    """
    taken: list[int] = []
    total, everything = 0, sum(sizes)
    for place, size in enumerate(sizes):
        if total + size <= wanted and total + size < everything:
            taken.append(place)
            total += size
        if total == wanted:
            return taken
    if len(sizes) * wanted > SEARCHED:
        return taken
    sums: dict[int, tuple[int, int]] = {0: (-1, 0)}  # sum -> (its last group, the sum without that group)
    for place, size in enumerate(sizes):
        for smaller in list(sums):
            if smaller + size < min(everything, 2 * wanted):
                sums.setdefault(smaller + size, (place, smaller))
    total, taken = min(sums, key=lambda found: (abs(found - wanted), found)), []
    while total:
        place, total = sums[total]
        taken.append(place)
    return taken


def _split_note(wanted: int, sizes: Sequence[int], chosen: Sequence[int]) -> str:
    """Return the reason why another number of records is held out than was wanted."""
    found, least, most = sum(sizes[place] for place in chosen), min(sizes), max(sizes)
    if sum(sizes) == 1:
        return "none held out: the only record is trained on"
    if len(sizes) == 1:
        return f"none held out: all {most} records have the same prompt, and equal prompts stay on one side"
    each = f"{least} records each" if least == most else f"{least} to {most} records each"
    more = "" if found else f"; type data.validation={least} to hold out one prompt"
    return (
        f"{found} held out where {wanted} were requested: equal prompts stay on one side, and the {len(sizes)} prompts "
        f"have {each}{more}"
    )
