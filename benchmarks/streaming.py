"""Memory and CPU time of a large file with ``data.streaming=true``: ``python -m benchmarks.streaming``.

A JSON-lines file of the size is drawn from a seed, then loaded, split and encoded as a stage does, in a process of its
own. Printed are CPU seconds in all and for each megabyte, and the peak resident memory beyond that of the imports.
"""

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.gate import largest_resident_bytes, resident_bytes
from benchmarks.models import TINY_VOCABULARY, tokenizer_folder
from rlhf.data.data import Data
from rlhf.data.records import RecordName
from rlhf.data.testbed.world import Testbed

MEGABYTE = 1_000_000
TEXTS = 4000  # of the testbed, which the rows are drawn from
WORDS = (20, 300)  # shortest and longest prompt and response, words
SIZES = (10, 100, 1000)
RECORDS: dict[str, RecordName] = {"demonstration": "demonstration", "text": "text"}


def write_rows(path: Path, record: RecordName, megabytes: float) -> int:
    """Write rows of random lengths until the file has the size; return their number."""
    draw, size, count = random.Random(f"{record}"), 0, 0
    words = [word for document in Testbed().texts(TEXTS, 0) for word in document.text.split()]

    def text() -> str:
        length = draw.randint(*WORDS)
        start = draw.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * MEGABYTE:
            row = {"text": text()} if record == "text" else {"prompt": f"{count} {text()}", "completion": text()}
            size += file.write(json.dumps(row) + "\n")
            count += 1
    return count


def encode(path: Path, record: RecordName) -> dict[str, Any]:
    """Load and encode a file; return CPU seconds, peak memory in bytes, rows and tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(TINY_VOCABULARY))
    base, begin = resident_bytes(), time.process_time()
    split = Data(record, str(path), None, 0.01, 512, streaming=True).load()
    loaded = time.process_time()
    reports = [split.encode(tokenizer, part)[1] for part in ("train", "validation")]
    return {
        "load": loaded - begin,
        "encode": time.process_time() - loaded,
        "memory": largest_resident_bytes() - base,
        "rows": sum(report.kept for report in reports),
        "tokens": sum(report.tokens for report in reports),
    }


def _measure(path: Path, record: RecordName, pipe: Connection) -> None:
    pipe.send(encode(path, record))


def main(words: Sequence[str] | None = None) -> None:
    """Print a table: a line for each size."""
    parser = argparse.ArgumentParser("python -m benchmarks.streaming", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--megabytes", type=float, action="append", help="a size; repeat for several; default: 10 100 1000"
    )
    parser.add_argument("--record", choices=RECORDS, default="demonstration", help="default: demonstration")
    options = parser.parse_args(words)
    record = RECORDS[options.record]
    print("| MB | rows | tokens | load, CPU s | encode, CPU s | CPU s for each MB | peak memory, MB |")
    print("|---|---|---|---|---|---|---|")
    context = multiprocessing.get_context("fork")
    for size in options.megabytes or SIZES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            write_rows(path, record, size)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_measure, args=(path, record, sender))
            process.start()
            sender.close()
            try:
                found = receiver.recv()
            except EOFError:
                process.join()
                raise SystemExit(f"{size:g} MB: the process ended with status {process.exitcode}") from None
            process.join()
        each = (found["load"] + found["encode"]) / size
        print(
            f"| {size:g} | {found['rows']} | {found['tokens']} | {found['load']:.1f} | {found['encode']:.1f} "
            f"| {each:.2f} | {found['memory'] / 1e6:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
