"""File of `rlhf generate`: one process writes it at a time, and it is resumed after a kill at any moment."""

import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.storage import files
from rlhf.using import response_file
from rlhf.using.response_file import ResponseFile

SETTINGS = {"run": "outputs/sft/abc", "seed": 0}
PROMPTS, SAMPLES = 6, 2


def write(path: Path, settings: dict = SETTINGS, force: bool = False, stop: int | None = None) -> list[int]:
    """Write missing responses, one prompt at a time, and return the prompts; `stop` ends after so many."""
    file, written = ResponseFile(path, settings, SAMPLES), []
    with file.writing(force) as done:
        for prompt in range(done, PROMPTS)[:stop]:
            rows = [{"index": prompt, "sample": k, "response": f"{settings['seed']}"} for k in range(SAMPLES)]
            with path.open("a") as out:
                out.write("".join(json.dumps(row) + "\n" for row in rows))
            written.append(prompt)
    return written


def rows(path: Path) -> Iterator[tuple[int, int, str]]:
    for line in path.read_text().splitlines():
        row = json.loads(line)
        yield row["index"], row["sample"], row["response"]


def whole(path: Path, response: str = "0") -> bool:
    return list(rows(path)) == [(i, k, response) for i in range(PROMPTS) for k in range(SAMPLES)]


@pytest.mark.parametrize(
    ("left", "first"),
    [
        (b"", 2),
        (b'{"index": 2, "sample": 0, "response": "0"}\n', 2),  # one of two samples
        (b'{"index": 2, "sam', 2),
        (b'{"index": 2, "sample": 0, "response": "0"}\n{"index": 9, "sample": 1, "response": "0"}\n', 2),
        (b"\0\0\0\0\n" + b'{"index": 3, "sample": 1, "response": "0"}\n' * 3, 2),
        (b"[]\n\xff\n", 2),
    ],
)
def test_partial_responses_after_a_kill_are_written_again(tmp_path: Path, left: bytes, first: int) -> None:
    path = tmp_path / "a" / "responses.jsonl"
    assert write(path, stop=2) == [0, 1]
    with path.open("ab") as file:
        file.write(left)
    assert write(path) == list(range(first, PROMPTS)) and whole(path)
    assert write(path) == []


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("moment", ["settings", "file"])
def test_a_kill_before_the_first_response_costs_nothing(tmp_path: Path, monkeypatch, force: bool, moment: str) -> None:
    path = tmp_path / "responses.jsonl"
    if force:
        write(path, SETTINGS | {"seed": 1})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            *((response_file, "write_json", killed) if moment == "settings" else (Path, "write_bytes", killed))
        )
        write(path, force=force)
    assert write(path) == list(range(PROMPTS)) and whole(path)


def test_an_empty_file_without_settings_is_started(tmp_path: Path) -> None:
    """Older versions left such a file when they were killed before the first response."""
    path = tmp_path / "responses.jsonl"
    path.touch()
    assert write(path) == list(range(PROMPTS)) and whole(path)


def test_the_second_of_two_writers_waits_for_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "responses.jsonl"
    context = multiprocessing.get_context("fork")
    begun, waits = context.Event(), context.Event()

    def first() -> None:
        with ResponseFile(path, SETTINGS, SAMPLES).writing(False):
            begun.set()
            assert waits.wait(60)
        write(path)

    child = context.Process(target=first)
    child.start()
    assert begun.wait(60)
    with path.open("a") as file:
        file.write('{"index": 0, "sample": 0, "response": "0"}\n')
    with pytest.raises(UserError, match="was made with seed=0, not seed=1"):  # immediately, and not after the wait
        write(path, SETTINGS | {"seed": 1})
    waits.set()
    write(path)
    child.join(60)
    assert child.exitcode == 0 and whole(path)


def test_unwritable_files_are_refused(tmp_path: Path) -> None:
    for force in (False, True):
        with pytest.raises(UserError, match="is a directory; type the path of a file"):
            write(tmp_path, force=force)
    path = tmp_path / "mine.jsonl"
    path.write_text("{}\n")
    for settings in (None, "[1]", "half {"):
        if settings is not None:
            path.with_name("mine.jsonl.meta.json").write_text(settings)
        with pytest.raises(UserError, match=r"exists, but .*\.meta\.json has no settings; type another file"):
            write(path)
    assert path.read_text() == "{}\n"
    assert files.read_json(path)[0] == {}


@pytest.mark.parametrize("name", [".", "/", ".."])
def test_a_directory_is_refused_as_a_file_of_responses(name: str) -> None:
    with pytest.raises(UserError, match=r"--out .*: is a directory; type the path of a file"):
        ResponseFile(Path(name), {}, 1)
