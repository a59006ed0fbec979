"""Where rows come from: local files and globs, folders of runs, Hugging Face data sets."""

import glob
import gzip
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rlhf.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".txt")
TESTBED = "testbed"
ARITHMETIC = "arithmetic"  # the testbed's word problems


@dataclass(frozen=True, slots=True)
class Row:
    """One raw row: where it is (file, row from 1) and what it holds, or why it could not be read."""

    file: str
    row: int
    raw: Any
    error: str | None = None


def find_files(source: str, record: str) -> list[Path]:
    """The local files that a source names: a file, a glob, or a folder; empty where it is not local.

    Of a folder (such as a run's), RECORDs.jsonl is read if it is there, else every data file directly in it.
    Raises UserError for what looks like a path but is not there.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if not _kind(path):
            raise UserError(
                f"data.source={source}: cannot read {path.suffix!r}; files end in {', '.join(SUFFIXES)}[.gz]"
            )
        return [path]
    if path.is_dir():
        own = path / f"{record}s.jsonl"
        for file in (own, path / "comparisons.jsonl"):  # comparisons can serve as labels, prompts, demonstrations
            if file.is_file() and record != "text":
                return [file]
        if (path / "status.json").is_file():
            raise UserError(
                f"data.source={source}: this run left no {own.name}; give a run of stage=collect, or a file"
            )
        found = sorted(file for file in path.iterdir() if file.is_file() and _kind(file))
        if not found:
            raise UserError(f"data.source={source}: no {own.name} and no other data file in this folder")
        return found
    if any(character in source for character in "*?["):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if _kind(Path(name)))
        if not found:
            raise UserError(f"data.source={source}: no data file matches")
        return found
    if _kind(path) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"data.source={source}: no such file; give a path, a glob, a Hugging Face id or testbed")
    return []


def _kind(path: Path) -> str:
    """The suffix that says how to read a file, "" where none does."""
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else ""


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def read_files(files: list[Path]) -> Iterator[Row]:
    """Rows of local files, lazily where the format allows; a line that is no JSON becomes a row with an error."""
    for path in files:
        kind, name = _kind(path), path.name
        if kind == ".parquet":
            import pyarrow.parquet

            number = 0
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                for raw in batch.to_pylist():
                    number += 1
                    yield Row(name, number, raw)
            continue
        with _open(path) as binary, io.TextIOWrapper(binary, encoding="utf-8", errors="replace") as stream:
            if kind == ".txt":
                yield from _read_text(stream, name)
            elif kind == ".json":
                yield from _read_json(stream, path)
            else:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield _parse(line, name, number)


def _parse(line: str, name: str, number: int) -> Row:
    try:
        return Row(name, number, json.loads(line))
    except json.JSONDecodeError as error:
        return Row(name, number, None, f"not JSON ({error.msg} at column {error.colno})")


def _read_json(stream: IO[str], path: Path) -> Iterator[Row]:
    try:
        rows = json.load(stream)
    except json.JSONDecodeError as error:
        raise UserError(f"data.source={path}: not JSON ({error.msg}, line {error.lineno})") from None
    if isinstance(rows, dict):  # {"data": [...]} and its like
        lists = [value for value in rows.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise UserError(f"data.source={path}: expected a list of rows, or an object that holds one list")
        rows = lists[0]
    yield from (Row(path.name, number, raw) for number, raw in enumerate(rows, 1))


def _read_text(stream: IO[str], name: str) -> Iterator[Row]:
    """Plain text: documents parted by empty lines if there are any, else one a line."""
    content = stream.read()
    documents = content.split("\n\n") if "\n\n" in content else content.splitlines()
    yield from (
        Row(name, number, {"text": document}) for number, document in enumerate(documents, 1) if document.strip()
    )


def read_hub(source: str, split: str, lazily: bool) -> Iterator[Row]:
    """Rows of a Hugging Face data set (ID or ID:SUBSET), from the hub or from its local cache. Raises UserError."""
    import datasets

    name, _, subset = source.partition(":")
    try:
        rows = datasets.load_dataset(name, name=subset or None, split=split, streaming=lazily)
    except Exception as error:  # the library raises a dozen unrelated types for "not there"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data.source={source}: neither a local file nor a data set that can be loaded ({reason}); "
            "give a path, a glob, a Hugging Face id or testbed"
        ) from error
    yield from (Row(source, number, raw) for number, raw in enumerate(rows, 1))


def digest_files(files: list[Path]) -> str:
    """sha256 of the contents of files, whatever their names."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()
