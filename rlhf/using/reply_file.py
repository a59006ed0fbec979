"""Replies as JSON lines, written as they come; a file that was interrupted is gone on with. No torch here."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import runs
from rlhf.data.records import Message, Prompt
from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.rollout import Rollout

Json = dict[str, Any]


class ReplyFile:
    """A file of replies, K lines a prompt, and beside it ``FILE.meta.json``: what made them.

    A line holds ``index`` (of the prompt, from 0), ``sample`` (from 0), ``messages`` (prompt and reply: a demonstration
    of rlhf's data formats), ``reply``, ``logprob`` (of the whole reply under the distribution it was sampled from),
    ``tokens``, ``ended`` (whether it came to its end of turn), and ``tags`` and ``reference`` if the prompt has any.

    Args:
        path: The file.
        settings: All that the replies follow from. A file made from other settings is not gone on with.
        samples: Lines per prompt.
    """

    def __init__(self, path: Path, settings: Json, samples: int) -> None:
        self.path, self.settings, self.samples = path, json.loads(json.dumps(settings)), samples
        self.meta = path.with_name(path.name + ".meta.json")

    def open(self, force: bool) -> int:
        """Makes the file ready to be written to: how many prompts have their replies already.

        Args:
            force: Starts over whatever is there.

        Raises:
            UserError: There is a file that something else has made.
        """
        done = 0
        if self.path.exists() and not force:
            self._check()
            lines = self.path.read_bytes().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith(b"\n")]
            done = len(whole) // self.samples
            with self.path.open("r+b") as file:  # what a kill left half written is written again
                file.truncate(sum(len(line) for line in whole[: done * self.samples]))
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(b"")
        runs.write_json(self.meta, self.settings)
        return done

    def _check(self) -> None:
        try:
            before = json.loads(self.meta.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(
                f"--out {self.path}: exists, and nothing says how it was made; name another file, or type --force"
            ) from None
        for key, value in self.settings.items():
            if before.get(key) != value:
                raise UserError(
                    f"--out {self.path}: exists and was made with {key}={before.get(key)}, now it is {value}; name "
                    "another file, or type --force"
                )

    def add(self, rollout: "Rollout", first: int) -> None:
        """Writes the replies to prompts number ``first`` and following, whole."""
        logp, lengths = rollout.logp.sum(dim=1).tolist(), rollout.lengths.tolist()
        lines = []
        for row, (prompt, reply) in enumerate(zip(rollout.prompts, rollout.texts, strict=True)):
            content: Json = {
                "index": first + row // self.samples,
                "sample": row % self.samples,
                "messages": [message.to_json() for message in (*prompt.messages, Message("assistant", reply))],
                "reply": reply,
                "logprob": logp[row],
                "tokens": int(lengths[row]),
                "ended": bool(rollout.ended[row]),
            }
            content |= {"tags": list(prompt.tags)} if prompt.tags else {}
            content |= {"reference": prompt.reference} if prompt.reference is not None else {}
            lines.append(json.dumps(content, ensure_ascii=False) + "\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def rows(self) -> list[Json]:
        """All lines."""
        with self.path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]


def digest(prompts: Sequence[Prompt]) -> str:
    """sha256 of prompts, in order."""
    text = json.dumps([prompt.to_json() for prompt in prompts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
