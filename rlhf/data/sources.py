"""Data sources: local files and globs, run directories, Hugging Face data sets."""

import codecs
import glob
import gzip
import hashlib
import io
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rlhf.errors import UserError, first_line, key

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".txt")
TESTBED = "testbed"
ARITHMETIC = "arithmetic"  # the testbed's word problems
_ANY_SOURCE = f"type a path, a glob, a Hugging Face id or {key('data.source', TESTBED)}"


@dataclass(frozen=True, slots=True)
class Row:
    """Raw row: its location (file, row from 1) and its content, or the reason why it could not be read."""

    file: str
    row: int
    raw: Any
    error: str | None = None

    @property
    def place(self) -> str:
        """Location as text: "file, row 3"."""
        return f"{self.file}, row {self.row}"


def source_error(source: str | Path, problem: str, fix: str) -> UserError:
    """Return an error about a source, or about one of its files."""
    return UserError(problem, fix=fix, option="data.source", value=source)


def find_files(source: str, record: str) -> list[Path]:
    """Return the local files of a source: a file, a glob or a directory; empty if the source is not local.

    Of a directory (such as a run's), RECORDs.jsonl or comparisons.jsonl is used if present (for texts neither), else
    all data files directly in it.

    Raises:
        UserError: For a source that looks like a path but does not exist or cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if not _kind(path):
            raise source_error(
                source,
                f"cannot read {f'files that end in {path.suffix}' if path.suffix else 'files without a suffix'}",
                fix=f"convert or rename the file, so that it ends in {', '.join(SUFFIXES)}[.gz]",
            )
        return [path]
    if path.is_dir():
        own = path / f"{record}s.jsonl"
        for file in (own, path / "comparisons.jsonl"):  # comparisons can serve as labels, prompts, demonstrations
            if file.is_file() and record != "text":
                return [file]
        if (path / "status.json").is_file():
            raise source_error(source, f"the run has no {own.name}", fix="type a run of stage=collect, or a file")
        if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            raise source_error(
                source,
                "is a directory written by save_to_disk of the library datasets, which cannot be read",
                fix="write the rows with Dataset.to_parquet('rows.parquet') and type "
                f"{key('data.source', 'rows.parquet')}",
            )
        found = sorted(file for file in path.iterdir() if file.is_file() and _kind(file))
        if not found:
            raise source_error(
                source,
                f"the directory has neither {own.name} nor any other data file",
                fix=f"type a directory with files that end in {', '.join(SUFFIXES)}[.gz]",
            )
        return found
    if any(character in source for character in "*?["):
        matching = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        for file in matching:
            if not _kind(file):
                raise source_error(
                    source,
                    f"matches {file} too, which cannot be read",
                    fix=f"narrow the glob to files that end in {', '.join(SUFFIXES)}[.gz]",
                )
        if not matching:
            raise source_error(
                source, "no file matches the glob", fix=f"type a path, or a glob that matches files (ls {path})"
            )
        return matching
    if _kind(path) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise source_error(source, "no such file", fix=_ANY_SOURCE)
    return []


def _kind(path: Path) -> str:
    """Return the suffix that determines how a file is read, "" if it cannot be read."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else ""


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as stream:
        start = stream.read(2)
    if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise source_error(path, "is UTF-16, must be UTF-8", fix=f"convert it: iconv -f utf-16 -t utf-8 {path.name}")
    zipped = path.suffix.lower() == ".gz" or start == b"\x1f\x8b"
    return gzip.open(path, "rb") if zipped else path.open("rb")  # type: ignore[return-value]


def read_files(files: list[Path]) -> Iterator[Row]:
    """Yield the rows of local files, lazily where the format allows.

    A line that cannot be read becomes a row with an error.

    Raises:
        UserError: For a file that is broken as a whole.
    """
    for path in files:
        number = 0
        try:
            for row in _read(path):
                number = row.row
                yield row
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise source_error(
                path, f"is a broken gz file, unreadable after row {number} ({error})", fix="get the file again"
            ) from None
        except UnicodeDecodeError as error:
            raise source_error(
                path,
                f"is not UTF-8 (byte {error.object[error.start]:#x} after row {number})",
                fix=f"convert it, for example with: iconv -f latin1 -t utf-8 {path.name}",
            ) from None


def _read(path: Path) -> Iterator[Row]:
    kind, name = _kind(path), path.name
    if kind == ".parquet":
        yield from _read_parquet(path)
    elif kind == ".txt":
        yield from _read_text(path)
    elif kind == ".json":
        yield from _read_json(path)
    else:
        with _open(path) as lines:
            first = next((line for line in lines if line.strip()), b"")
        if first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):  # a JSON list in a file named as JSON lines
            yield from _read_json(path)
            return
        with _open(path) as lines:
            yield from _read_lines(lines, name)


def _read_lines(lines: Iterable[bytes], name: str) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            yield Row(name, number, raw, _half_character(raw) if b"\\ud" in line.lower() else None)
        except UnicodeDecodeError as error:
            yield Row(name, number, None, f"not UTF-8 (byte {line[error.start]:#x} at column {error.start + 1})")
        except json.JSONDecodeError as error:
            yield Row(name, number, None, f"not JSON ({error.msg} at column {error.colno})")
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            yield Row(name, number, None, f"cannot be parsed as JSON ({error})")


def _half_character(raw: Any) -> str | None:
    """Return the error of a row with an unpaired surrogate, which no tokenizer accepts; else None."""
    try:
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"not UTF-8 (unpaired surrogate {error.object[error.start]!a})"
    return None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for raw in batch.to_pylist():
                number += 1
                yield Row(path.name, number, without_nulls(raw))
    except (pyarrow.ArrowException, OSError) as error:
        reason = first_line(error)
        raise source_error(
            path, f"is a broken parquet file, unreadable after row {number} ({reason})", fix="get the file again"
        ) from None


def _read_json(path: Path) -> Iterator[Row]:
    """Yield the rows of a list, of an object that contains one list, or of JSON lines, which often have this suffix."""
    with _open(path) as binary:
        content = binary.read()
    if not content.strip():
        raise source_error(path, "the file is empty", fix="type another file")
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        if _is_json_object(content.lstrip().partition(b"\n")[0]):
            yield from _read_lines(content.splitlines(), path.name)
            return
        other = ", or name it .jsonl if it has one object a line" if _kind(path) == ".json" else ""
        raise source_error(
            path, f"is not JSON ({error.msg}, line {error.lineno})", fix=f"fix the file{other}"
        ) from None
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise source_error(path, f"cannot be parsed as JSON ({error})", fix="fix the file") from None
    if isinstance(rows, dict) and (
        {"messages", "conversations"} & set(rows) or not any(isinstance(value, list) for value in rows.values())
    ):
        rows = [rows]  # a row, not a list of them
    if isinstance(rows, dict):  # for example {"data": [...]}
        lists = [value for value in rows.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise source_error(
                path,
                f"must be a list of rows, or an object with one list, but is an object with {len(lists)} lists",
                fix="fix the file",
            )
        rows = lists[0]
    halves = b"\\ud" in content.lower()
    if not isinstance(rows, list):
        raise source_error(path, f"must be a list of rows, got {type(rows).__name__}", fix="fix the file")
    for number, raw in enumerate(rows, 1):
        yield Row(path.name, number, raw, _half_character(raw) if halves else None)


def _is_json_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _read_text(path: Path) -> Iterator[Row]:
    """Yield documents of plain text: separated by empty lines if there are any, else one per line."""
    with _text(path) as stream:
        pieces = iter(lambda: stream.read(2**20), "")
        last = ""
        parted = False
        for piece in pieces:
            parted = parted or "\n\n" in last + piece
            last = piece[-1:]
            if parted:
                break
    with _text(path) as stream:
        documents = _parted(stream) if parted else (line.removesuffix("\n") for line in stream)
        for number, document in enumerate(documents, 1):
            if document.strip():
                yield Row(path.name, number, {"text": document})


@contextmanager
def _text(path: Path) -> Iterator[IO[str]]:
    with _open(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig") as stream:
        yield stream


def _parted(stream: IO[str]) -> Iterator[str]:
    r"""Yield the parts of `stream.read().split('\n\n')`, reading one chunk at a time."""
    rest = ""
    for piece in iter(lambda: stream.read(2**20), ""):
        *whole, rest = (rest + piece).split("\n\n")
        yield from whole
    yield rest


def read_hub(source: str, split: str, lazily: bool) -> Iterator[Row]:
    """Yield rows of a Hugging Face data set (ID or ID:SUBSET), from the hub or from its local cache.

    Raises:
        UserError: If the data set cannot be loaded, or if the hub is not reachable and the cache lacks it.
    """
    from rlhf.storage import hub

    online = hub.use_cache_if_unreachable()
    import datasets

    if not online:
        datasets.config.HF_HUB_OFFLINE = True
    name, _, subset = source.partition(":")
    try:
        # A cached data set is complete and cannot be streamed.
        rows = datasets.load_dataset(name, name=subset or None, split=split, streaming=lazily and online)
    except Exception as error:  # the library raises a dozen unrelated types for a missing data set
        reason = first_line(error)
        if not online:
            raise source_error(
                source,
                "no such file, the hub is not reachable, and its cache on this machine has no such data set",
                fix="type the path of a local file or a glob, or go online",
            ) from error
        raise source_error(
            source, f"is neither a local file nor a data set that can be loaded ({reason})", fix=_ANY_SOURCE
        ) from error
    yield from (Row(source, number, without_nulls(raw)) for number, raw in enumerate(rows, 1))


def without_nulls(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a row of an Arrow table without the null fields of its structs, at any depth; columns keep theirs.

    Arrow gives the structs of a column one type, so every struct has the fields of all rows. Fields that its row never
    had are null: arguments of other tools' calls, properties of other schemas.
    """
    return {name: _without_nulls(value) for name, value in raw.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def check_numbers(value: Any, field: str = "") -> None:
    """Raise ValueError, naming the field, if a row contains NaN or an infinite number at any depth."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{field}: {value} is not a finite number")
    elif isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(item, str):
                check_numbers(item, f"{field}.{name}" if field else str(name))
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            if not isinstance(item, str):
                check_numbers(item, f"{field}[{place}]")


def digest_files(files: list[Path]) -> str:
    """Return the sha256 of the contents of files, independent of their names."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()
