"""data.streaming: the same records, tokens and batches as in memory, stored on disk."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data import Data, Mixture
from rlhf.data.batches import Batches
from rlhf.data.collate import pack, packed
from rlhf.data.disk import Chain, DiskList, OnDisk, View, lengths, store_like
from rlhf.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def source(folder: Path, name: str = "a", count: int = 60) -> str:
    rows = [
        {"prompt": f"{name} {number % 50}", "completion": f"response {number} " * (number % 7 + 1)}
        for number in range(count)
    ]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "broken\n")
    return str(path)


def both(path: str, record: Any = "demonstration", **hyperparameters: Any) -> tuple[Data, Data]:
    """Return the data in memory and streamed."""
    known = {"size": None, "validation": 0.2, "max_length": 24, **hyperparameters}
    return Data(record, path, **known), Data(record, path, **known, streaming=True)


def test_lists_on_disk_behave_as_lists(cache: Path) -> None:
    items = [(number, "x" * number) for number in range(100)]
    lies = DiskList(iter(items))
    assert len(lies) == 100 and list(lies) == items and lies[-1] == items[-1] and lies[7] == items[7]
    assert list(lies[10:40:3]) == items[10:40:3] and list(lies[::2][5:9]) == items[::2][5:9]
    assert isinstance(lies[1:3], OnDisk) and isinstance(lies[1:3][0:1], OnDisk)
    assert list(View(lies, [3, 3, 1])) == [items[3], items[3], items[1]]
    chain = Chain([lies[:3], [], items[3:]])
    assert list(chain) == items and chain[-1] == items[-1] and list(chain[2:5]) == items[2:5]
    for outside in (100, -101):
        with pytest.raises(IndexError):
            lies[outside]
        with pytest.raises(IndexError):
            chain[outside]
    assert list(lengths(DiskList(["ab", "", "abc"]))) == lengths(["ab", "", "abc"]) == [2, 0, 3]
    assert isinstance(store_like(items, like=lies), DiskList) and store_like(iter(items), like=[]) == items
    assert list((cache / "streams").iterdir()) == []  # a file without a name needs no clearing up


@pytest.mark.parametrize("record", ["demonstration", "text"])
def test_records_tokens_and_report_are_the_same(tmp_path: Path, tokenizer: Any, record: str) -> None:
    if record == "text":
        path = tmp_path / "t.txt"
        path.write_text("\n\n".join(f"line {number}\nand more of it" * (number % 5 + 1) for number in range(60)))
    here, there = both(str(path) if record == "text" else source(tmp_path), record)
    one, two = here.load(), there.load()
    assert isinstance(two.train, OnDisk) and isinstance(two.validation, OnDisk) and isinstance(one.train, list)
    assert (list(two.train), list(two.validation)) == (one.train, one.validation)
    assert str(two.report) == str(one.report) and two.report.bad == one.report.bad
    assert list(two.texts()) == list(one.texts())
    for part in ("train", "validation"):
        (rows, report), (lies, again) = one.encode(tokenizer, part), two.encode(tokenizer, part)  # type: ignore[arg-type]
        assert isinstance(lies, OnDisk) and list(lies) == rows and str(again) == str(report)
        assert list(lengths(lies)) == [len(row) for row in rows]
        assert list(store_like(packed(lies, 32), like=lies)) == pack(rows, 32)


def test_batches_and_a_resume_are_the_same(tmp_path: Path, tokenizer: Any) -> None:
    here, there = both(source(tmp_path))
    rows, lies = (data.load().encode(tokenizer, "train")[0] for data in (here, there))
    whole = [[rows[i] for i in batch] for batch in Batches(lengths(rows), 4, seed=3, epochs=2)]
    streamed = [[lies[i] for i in batch] for batch in Batches(lengths(lies), 4, seed=3, epochs=2)]
    assert streamed == whole and len(whole) > 10
    again = there.load().encode(tokenizer, "train")[0]  # in another process, after a kill
    assert [[again[i] for i in batch] for batch in Batches(lengths(again), 4, seed=3, epochs=2, start=9)] == whole[9:]


def test_mixtures_stream_if_a_part_does(tmp_path: Path) -> None:
    first, second = both(source(tmp_path)), both(source(tmp_path, "b", 30))
    splits = [
        Mixture({"a": one, "b": two}, {"a": 2, "b": 1}, 90).load()
        for one, two in ((first[0], second[0]), (first[1], second[0]), (first[1], second[1]))
    ]
    assert isinstance(splits[0].train, list) and all(isinstance(split.train, OnDisk) for split in splits[1:])
    assert len({str((list(split.train), list(split.validation), str(split.report))) for split in splits}) == 1


def test_streaming_an_unsupported_record_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.streaming=true: comparisons are kept in memory"):
        both(source(tmp_path), "comparison")


def test_a_text_larger_than_a_read_block_is_split_as_a_whole(tmp_path: Path) -> None:
    """Two newlines may fall on either side of where a piece of 2**20 characters ends."""
    for shift in range(4):
        content = "x" * (2**20 - 2 + shift) + "\n\n\nsecond\n\n\n\n\x0bthird\r\nline"
        path = tmp_path / f"{shift}.txt"
        path.write_text(content, newline="")
        found = [record.text for record in Data("text", str(path), None, 0, 8).load().train]
        assert found == [part for part in content.replace("\r\n", "\n").split("\n\n") if part.strip()]
