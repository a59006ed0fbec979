"""List and remove what the cache holds: rlhf cache list | rm ENTRY..."""

import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import console
from rlhf.cli import options
from rlhf.errors import UserError, suggest
from rlhf.runs.run_directory import remove
from rlhf.storage.cache import cache_home
from rlhf.storage.files import read_json
from rlhf.storage.locks import Locked, lock

DAY = 86400  # seconds

#: Directory of the cache -> what it holds; an entry is one file or directory in it.
KINDS = {
    "benchmarks": "model or tokenizer of python -m benchmarks",
    "gguf": "weights converted from a GGUF file",
    "reference": "log-probabilities of a reference policy",
}
#: The same for directories of many small files, each of which is one entry.
WHOLE = {
    "code": "digests of source files",
    "validation": "configs that passed validation",
}


@dataclass(frozen=True)
class Entry:
    """Entry of the cache.

    Attributes:
        name: KIND/NAME, or KIND for a directory that is one entry.
        path: File or directory.
    """

    name: str
    path: Path

    @property
    def size(self) -> int:
        """Size in bytes; links are not followed."""
        if self.path.is_symlink() or not self.path.is_dir():
            return self.path.lstat().st_size
        return sum(file.lstat().st_size for file in self.path.rglob("*") if file.is_symlink() or file.is_file())

    @property
    def days(self) -> float:
        """Days since the last use, as far as it is recorded, else since the last change."""
        return max(0.0, time.time() - self.path.lstat().st_mtime) / DAY

    @property
    def about(self) -> str:
        """Description: what it is and what it was made from."""
        kind, _, name = self.name.partition("/")
        if name.startswith("."):
            return "left by a command that was killed, or being written"
        if kind == "reference":
            count, model = _reference(self.path)
            return f"{count} {KINDS[kind]}{f', {model}' if model else ''}" if count else KINDS[kind]
        source = read_json(self.path / "gguf.json")[0] if kind == "gguf" else None
        made_from = f", {source.get('path')}" if isinstance(source, dict) else ""
        return {**KINDS, **WHOLE}[kind] + made_from

    @property
    def locks(self) -> list[Path]:
        """Existing lock files of processes that write this entry."""
        if "/" not in self.name:
            return []
        base = self.path.name.removeprefix(".").removesuffix(".part")
        names = {f"{base}.lock", f".{base}.lock", f"{Path(base).stem}.lock"}
        return [file for file in (self.path.with_name(name) for name in sorted(names)) if file.is_file()]


def main(argv: list[str]) -> int:
    """Run the sub-command; return its exit status."""
    parser = options.Parser(prog="rlhf cache", description="List and remove what the cache (RLHF_CACHE) holds.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|rm")
    commands.add_parser("list", help="list all entries: size, days since the last use, what they were made from")
    removes = commands.add_parser("rm", help="remove entries; what is needed again is computed again")
    removes.add_argument(
        "entries", nargs="*", metavar="ENTRY", help="entry as listed, or its first letters; reference: all of them"
    )
    removes.add_argument("--older", type=float, metavar="DAYS", help="only entries not used for this many days")
    removes.add_argument("--all", action="store_true", help="every entry")
    removes.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    args = parser.parse_args(argv)
    if args.command == "list":
        return list_entries()
    return remove_entries(args.entries, args.older, args.all, args.yes)


def entries() -> list[Entry]:
    """Return the entries of the cache, by name; files of others beside them are not among them."""
    home = cache_home()
    found = [Entry(kind, home / kind) for kind in WHOLE if (home / kind).is_dir()]
    for kind in KINDS:
        if (home / kind).is_dir() and not (home / kind).is_symlink():
            names = sorted(name for name in os.listdir(home / kind) if not name.endswith(".lock"))
            found += [Entry(f"{kind}/{name}", home / kind / name) for name in names]
    return sorted(found, key=lambda entry: entry.name)


def list_entries() -> int:
    """Print a table of the entries and their total size; return the exit status."""
    sized = [(entry, entry.size) for entry in entries()]
    rows = [(entry.name, _readable(size), f"{entry.days:.0f}", entry.about) for entry, size in sized]
    console.print_table("", ("entry", "size", "days", "what it is"), rows)
    print(f"{cache_home()}: {_readable(sum(size for _, size in sized))}")
    return 0


def remove_entries(names: Sequence[str], older: float | None, everything: bool, yes: bool) -> int:
    """Remove entries after confirmation; return the exit status.

    Raises:
        UserError: No entry is named, a name selects none, or a process is writing one of them.
    """
    known = entries()
    if not names and not everything and older is None:
        raise UserError("rlhf cache rm: names no entry", fix="type an entry of rlhf cache list, --older DAYS, or --all")
    chosen = known if not names else []
    for name in names:
        found = [entry for entry in known if name and entry.name.startswith(name)]
        if not found:
            raise UserError(f"{name or repr(name)}: no such entry{suggest(name, [entry.name for entry in known])}")
        chosen += [entry for entry in found if entry not in chosen]
    chosen = [entry for entry in chosen if older is None or entry.days >= older]
    if not chosen:
        print("nothing to remove")
        return 0
    if not options.confirm_removal([f"{entry.name}  {_readable(entry.size)}" for entry in chosen], yes):
        return 1
    for entry in chosen:
        with ExitStack() as held:
            try:
                for file in entry.locks:
                    held.enter_context(lock(file))
            except Locked:
                raise UserError(
                    f"{entry.name} is being written by another process", "stop that process first"
                ) from None
            with suppress(FileNotFoundError):  # another process removed it meanwhile
                away = entry.path.with_name(f".{entry.path.name.removeprefix('.')}.{os.getpid()}.removed")
                entry.path.rename(away)  # a reader finds the entry whole or not at all
                remove(away)
            for file in entry.locks:
                file.unlink(missing_ok=True)
    print(f"removed {len(chosen)}")
    return 0


def _reference(file: Path) -> tuple[int, str]:
    """Return the number of log-probabilities in a file and the model that they are of, from its header alone."""
    try:
        with file.open("rb") as stream:
            header: Any = json.loads(stream.read(min(int.from_bytes(stream.read(8), "little"), 1 << 16)))
        return int(header["logp"]["shape"][0]), str(header["__metadata__"].get("reference", ""))
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return 0, ""


def _readable(size: int) -> str:
    """Return a size in the largest unit of which there is one."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} B"
