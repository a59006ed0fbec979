"""Cache of reference log-probabilities on disk, shared by all runs with the same reference and rows.

A file is named by all that its numbers depend on: weights, precision, rows, code, versions and processor. The rows are
a set: they are sorted and batched in one fixed way, so that neither the order of the data nor the micro-batches of a
run change a number or a name.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import transformers
from torch import Tensor

from rlhf.data.collate import collate
from rlhf.data.encoded_rows import Encoded
from rlhf.errors import UserError
from rlhf.models.adapters import TRAINED
from rlhf.models.reference import Reference
from rlhf.models.sharding import is_sharded
from rlhf.runs.source_code import reached_digest
from rlhf.storage.cache import cache_folder, mark_used
from rlhf.storage.files import write_bytes
from rlhf.storage.locks import lock

Row = tuple[Sequence[int], Sequence[int]]  # tokens of a prompt and of a response to it

BATCH_TOKENS = 4096  # rows times the longest of them in a forward pass; ours


def cached_logprobs(
    reference: Reference,
    rows: Sequence[Row],
    pad_id: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda count: None,
    note: Callable[[str], None] = print,
) -> list[float]:
    """Return the reference's log-probability of each response: those of its tokens summed, in nats.

    They are read from the cache if a run has stored them. Otherwise one process computes and stores them, and others
    that need the same file wait for it. Without a writable cache they are computed.

    Args:
        reference: The frozen policy.
        rows: Prompts and responses; equal ones are computed once.
        pad_id: Token that fills a batch.
        device: Where to compute.
        advance: Called with the number of distinct rows done.
        note: Prints one line.
    """
    names = [_row_digest(row) for row in rows]
    distinct = dict(zip(names, rows, strict=True))
    ordered = sorted(distinct)
    file = None
    # Sharded weights name no file: each rank has a part of them, and all ranks must make the same passes.
    if not is_sharded(reference.modules[0]):
        with suppress(UserError):  # a cache that cannot be created
            file = cache_folder("reference") / f"{_key(reference, ordered, device)}.safetensors"
    found = None if file is None else _read(file, len(ordered))
    if found is None:
        writable = file is not None and os.access(file.parent, os.W_OK)
        guard = file.with_suffix(".lock") if file is not None and writable else None
        waiting = "another run computes the same reference log-probabilities; waiting for it"
        with nullcontext() if guard is None else lock(guard, lambda: note(waiting)):
            found = None if file is None else _read(file, len(ordered))
            if found is None:
                computed = _compute(reference, distinct, pad_id, device, advance)
                found = torch.tensor([computed[name] for name in ordered], dtype=torch.float32)
                if file is not None and writable:
                    with suppress(OSError):  # a full disk must not end the run
                        _write(file, found, str(reference.modules[0].base.config._name_or_path))
            if guard is not None:
                guard.unlink(missing_ok=True)
    logps = dict(zip(ordered, found.tolist(), strict=True))
    return [logps[name] for name in names]


def _row_digest(row: Row) -> bytes:
    prompt, response = row
    return hashlib.blake2b(array("q", [len(prompt), *prompt, *response]).tobytes(), digest_size=16).digest()


def _compute(
    reference: Reference,
    rows: dict[bytes, Row],
    pad_id: int,
    device: torch.device,
    advance: Callable[[int], None],
) -> dict[bytes, float]:
    """Compute the log-probability of each row, by its digest."""
    found: dict[bytes, float] = {}
    for names in _batches(rows):
        encoded = [
            Encoded([*prompt, *response], [False] * len(prompt) + [True] * len(response))
            for prompt, response in map(rows.__getitem__, names)
        ]
        logp = reference.logprobs(collate(encoded, pad_id).to(device)).sum(dim=1)
        found.update(zip(names, logp.tolist(), strict=True))
        advance(len(names))
    return found


def _batches(rows: dict[bytes, Row]) -> Iterator[list[bytes]]:
    """Yield the digests of the rows in batches of at most ``BATCH_TOKENS`` padded tokens, or of one row.

    Rows of one prompt are adjacent, so that a padding-free pass computes the prompt once; prompts are ordered by their
    longest row, so that little is padded. The batches depend on the set of rows alone.
    """

    def length(name: bytes) -> int:
        return sum(map(len, rows[name]))

    def prompt(name: bytes) -> Sequence[int]:
        return rows[name][0]

    groups = [
        list(group) for _, group in groupby(sorted(rows, key=lambda name: (prompt(name), length(name), name)), prompt)
    ]
    groups.sort(key=lambda group: length(group[-1]))  # stable: equal lengths stay in the order of their prompts
    batch: list[bytes] = []
    longest = 0
    for name in (name for group in groups for name in group):
        longest = max(longest, length(name))
        if batch and (len(batch) + 1) * longest > BATCH_TOKENS:
            yield batch
            batch, longest = [], length(name)
        batch.append(name)
    if batch:
        yield batch


def _key(reference: Reference, rows: Iterable[bytes], device: torch.device) -> str:
    """Return the digest of all that the log-probabilities of a set of rows depend on, 64 hexadecimal digits."""
    on_gpu = device.type == "cuda"
    autocast = torch.is_autocast_enabled(device.type)
    settings = {
        "code": reached_digest([__name__]),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "autocast": str(torch.get_autocast_dtype(device.type)) if autocast else None,
        "matmul": torch.get_float32_matmul_precision(),
        # Kernels sum in another order on another processor, or with another number of threads.
        "processor": torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
        "threads": None if on_gpu else torch.get_num_threads(),
        "reference": _reference_digest(reference),
    }
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for row in rows:
        total.update(row)
    return total.hexdigest()


def _reference_digest(reference: Reference) -> str:
    """Return the digest of a reference's architecture and weights, without a trained adapter that is off.

    A model with that adapter off computes what the model without it does, so both have the same digest.
    """
    model, switched = reference.modules
    config: dict[str, Any] = model.base.config.to_dict()
    config["attention"] = model.config._attn_implementation
    total = hashlib.sha256(f"{type(model.base).__module__}.{type(model.base).__name__} {model.padding_free}".encode())
    unread = ("_name_or_path", "transformers_version")
    total.update(json.dumps({k: v for k, v in config.items() if k not in unread}, sort_keys=True, default=str).encode())
    for name, value in sorted(model.base.state_dict().items()):
        if switched and f".{TRAINED}." in f".{name}.":
            continue
        total.update(name.replace(".base_layer.", ".").encode())
        if isinstance(value, Tensor):
            total.update(f"{value.dtype} {tuple(value.shape)}".encode())
            total.update(_bytes(value))
        else:
            total.update(repr(value).encode())
    return total.hexdigest()


def _bytes(value: Tensor) -> Any:
    """Return the content of a tensor as a buffer."""
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _read(file: Path, count: int) -> Tensor | None:
    """Return the ``count`` numbers of a file; None if it is missing, damaged, or stored under another name."""
    try:
        with safetensors.safe_open(str(file), framework="pt") as stored:
            about, logp = stored.metadata() or {}, stored.get_tensor("logp")
    except (OSError, safetensors.SafetensorError):
        return None
    whole = logp.dtype == torch.float32 and logp.shape == (count,)
    if not whole or about.get("sha256") != _checksum(file, logp):
        return None
    mark_used(file)
    return logp


def _write(file: Path, logp: Tensor, model: str) -> None:
    """Store the numbers, and for `rlhf cache list` the model that the first run with them read."""
    write_bytes(file, safetensors.torch.save({"logp": logp}, {"sha256": _checksum(file, logp), "reference": model}))


def _checksum(file: Path, logp: Tensor) -> str:
    """Return the digest of numbers and of the name under which they are stored."""
    return hashlib.sha256(file.stem.encode() + bytes(_bytes(logp))).hexdigest()
