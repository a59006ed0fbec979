"""The file of `rlhf generate`: one process writes it at a time, and it goes on after a kill at any moment."""

import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf import files
from rlhf.errors import UserError
from rlhf.using import reply_file
from rlhf.using.reply_file import ReplyFile

SETTINGS = {"run": "outputs/sft/abc", "seed": 0}
PROMPTS, SAMPLES = 6, 2


def write(path: Path, settings: dict = SETTINGS, force: bool = False, stop: int | None = None) -> list[int]:
    """Writes what is still missing, a prompt at a time; `stop` leaves after so many. Returns the prompts written."""
    file, written = ReplyFile(path, settings, SAMPLES), []
    with file.writing(force) as done:
        for prompt in range(done, PROMPTS)[:stop]:
            rows = [{"index": prompt, "sample": k, "reply": f"{settings['seed']}"} for k in range(SAMPLES)]
            with path.open("a") as out:
                out.write("".join(json.dumps(row) + "\n" for row in rows))
            written.append(prompt)
    return written


def rows(path: Path) -> Iterator[tuple[int, int, str]]:
    for line in path.read_text().splitlines():
        row = json.loads(line)
        yield row["index"], row["sample"], row["reply"]


def whole(path: Path, reply: str = "0") -> bool:
    return list(rows(path)) == [(i, k, reply) for i in range(PROMPTS) for k in range(SAMPLES)]


@pytest.mark.parametrize(
    ("left", "first"),
    [
        (b"", 2),
        (b'{"index": 2, "sample": 0, "reply": "0"}\n', 2),  # one of two samples
        (b'{"index": 2, "sam', 2),
        (b'{"index": 2, "sample": 0, "reply": "0"}\n{"index": 9, "sample": 1, "reply": "0"}\n', 2),
        (b"\0\0\0\0\n" + b'{"index": 3, "sample": 1, "reply": "0"}\n' * 3, 2),
        (b"[]\n\xff\n", 2),
    ],
)
def test_what_a_kill_left_is_written_again(tmp_path: Path, left: bytes, first: int) -> None:
    path = tmp_path / "a" / "replies.jsonl"
    assert write(path, stop=2) == [0, 1]
    with path.open("ab") as file:
        file.write(left)
    assert write(path) == list(range(first, PROMPTS)) and whole(path)
    assert write(path) == []


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("moment", ["settings", "file"])
def test_a_kill_before_the_first_reply_costs_nothing(tmp_path: Path, monkeypatch, force: bool, moment: str) -> None:
    path = tmp_path / "replies.jsonl"
    if force:
        write(path, SETTINGS | {"seed": 1})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*((reply_file, "write_json", killed) if moment == "settings" else (Path, "write_bytes", killed)))
        write(path, force=force)
    assert write(path) == list(range(PROMPTS)) and whole(path)


def test_an_empty_file_without_settings_is_begun(tmp_path: Path) -> None:
    """As older versions left it when they were killed before the first reply."""
    path = tmp_path / "replies.jsonl"
    path.touch()
    assert write(path) == list(range(PROMPTS)) and whole(path)


def test_of_two_that_write_one_file_one_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "replies.jsonl"
    context = multiprocessing.get_context("fork")
    begun, waits = context.Event(), context.Event()

    def first() -> None:
        with ReplyFile(path, SETTINGS, SAMPLES).writing(False):
            begun.set()
            assert waits.wait(60)
        write(path)

    child = context.Process(target=first)
    child.start()
    assert begun.wait(60)
    with path.open("a") as file:
        file.write('{"index": 0, "sample": 0, "reply": "0"}\n')
    with pytest.raises(UserError, match="was made with seed=0, now it is 1"):  # at once, and not after the wait
        write(path, SETTINGS | {"seed": 1})
    waits.set()
    write(path)
    child.join(60)
    assert child.exitcode == 0 and whole(path)


def test_what_cannot_be_written_to(tmp_path: Path) -> None:
    for force in (False, True):
        with pytest.raises(UserError, match="is a folder; name a file"):
            write(tmp_path, force=force)
    path = tmp_path / "mine.jsonl"
    path.write_text("{}\n")
    for settings in (None, "[1]", "half {"):
        if settings is not None:
            path.with_name("mine.jsonl.meta.json").write_text(settings)
        with pytest.raises(UserError, match="nothing says how it was made"):
            write(path)
    assert path.read_text() == "{}\n"
    assert files.read_json(path)[0] == {}


@pytest.mark.parametrize("name", [".", "/", ".."])
def test_a_folder_is_no_file_of_replies(name: str) -> None:
    with pytest.raises(UserError, match=r"--out .*: is a folder; name a file"):
        ReplyFile(Path(name), {}, 1)
