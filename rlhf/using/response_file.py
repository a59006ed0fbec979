"""File of responses as JSON lines, written incrementally; an interrupted file is resumed.

This module imports no torch.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.data.records import Message, Prompt
from rlhf.errors import UserError
from rlhf.storage import locks
from rlhf.storage.files import write_json

if TYPE_CHECKING:
    from rlhf.sampler.rollout import Rollout

Json = dict[str, Any]

_FIX = "type another file, or type --force to overwrite it"


class ResponseFile:
    """File of responses, K lines per prompt, with their settings beside it in ``FILE.meta.json``.

    A line holds ``index`` (of the prompt, from 0), ``sample`` (from 0), ``messages`` (prompt and response: a
    demonstration in rlhf's data formats), ``response``, ``logprob`` (of the whole response under the distribution that
    it was sampled from), ``tokens``, ``ended`` (whether it ended with end-of-turn), and ``tags`` and ``reference`` if
    the prompt has any.

    Args:
        path: The file.
        settings: All settings that determine the responses. A file with other settings is not resumed.
        samples: Lines per prompt.
    """

    def __init__(self, path: Path, settings: Json, samples: int) -> None:
        if path.is_dir():
            raise UserError("is a directory", fix="type the path of a file", option="--out", value=path)
        self.path, self.settings, self.samples = path, json.loads(json.dumps(settings)), samples
        self.meta = path.with_name(path.name + ".meta.json")

    @contextmanager
    def writing(self, force: bool) -> Iterator[int]:
        """Context manager: lock the file and prepare it for writing; yield how many prompts have all their responses.

        If another process writes the same file, this one waits for it, as runs do.

        Args:
            force: Overwrite an existing file.

        Raises:
            UserError: The file exists and has other settings or none.
        """

        def wait() -> None:
            if not force:
                self._check()  # raise now and not after a long wait
            print(f"{self.path}: waits for the process that is writing it", flush=True)

        with locks.lock(self.path.with_name(f".{self.path.name}.lock"), wait):
            yield self._open(force)

    def _open(self, force: bool) -> int:
        if force:
            self.path.unlink(missing_ok=True)  # before the new settings are written beside it
        if not self.path.exists() or self.path.stat().st_size == 0:
            # Settings first: a kill in between leaves no responses that these settings would describe wrongly.
            write_json(self.meta, self.settings)
            self.path.write_bytes(b"")
            return 0
        self._check()
        lines = self.path.read_bytes().split(b"\n")[:-1]  # the text after the last newline is an incomplete line
        whole = next((i for i, line in enumerate(lines) if not self._is_row(line, i)), len(lines))
        done = whole // self.samples
        if whole < len(lines):
            print(
                f"{self.path}: line {whole + 1} cannot be read; responses from prompt {done + 1} on are written again"
            )
        self._cut(lines[: done * self.samples])
        return done

    def keep(self, prompts: int) -> None:
        """Keep the responses to the first ``prompts`` prompts and remove all others, which are sampled again."""
        self._cut(self.path.read_bytes().split(b"\n")[: prompts * self.samples])

    def _cut(self, lines: list[bytes]) -> None:
        with self.path.open("r+b") as file:
            file.truncate(sum(len(line) + 1 for line in lines))

    def _is_row(self, line: bytes, number: int) -> bool:
        """Return whether a line is the row with this number."""
        try:
            row = json.loads(line)
        except ValueError:
            return False
        place = {"index": number // self.samples, "sample": number % self.samples}
        return isinstance(row, dict) and {key: row.get(key) for key in place} == place

    def _check(self) -> None:
        try:
            before = json.loads(self.meta.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = None
        if not isinstance(before, dict):
            raise UserError(f"exists, but {self.meta} has no settings", _FIX, "--out", self.path)
        for name, value in self.settings.items():
            if before.get(name) != value:
                problem = f"exists and was made with {name}={before.get(name)}, not {name}={value}"
                raise UserError(problem, _FIX, "--out", self.path)

    def add(self, rollout: "Rollout", first: int) -> None:
        """Append the responses to the prompts from number ``first`` on, and flush them to disk."""
        logp, lengths = rollout.logp.sum(dim=1).tolist(), rollout.lengths.tolist()
        lines = []
        for row, (prompt, response) in enumerate(zip(rollout.prompts, rollout.texts, strict=True)):
            content: Json = {
                "index": first + row // self.samples,
                "sample": row % self.samples,
                "messages": [message.to_json() for message in (*prompt.messages, Message("assistant", response))],
                "response": response,
                "logprob": logp[row],
                "tokens": int(lengths[row]),
                "ended": bool(rollout.ended[row]),
            }
            content |= {"tags": list(prompt.tags)} if prompt.tags else {}
            content |= {"reference": prompt.reference} if prompt.reference is not None else {}
            lines.append(json.dumps(content, ensure_ascii=False) + "\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[Json]:
        """Return all lines, parsed."""
        with self.path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]


def digest(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256 of the prompts, in order."""
    text = json.dumps([prompt.to_json() for prompt in prompts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
