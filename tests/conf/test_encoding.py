"""Files are UTF-8 in any locale, and commands are printed so that they can be typed."""

import ast
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf import console
from rlhf.cli import main
from rlhf.console import shell
from tests.names import ROOT

OPENING = ("read_text", "write_text", "fdopen", "NamedTemporaryFile")


def _is_binary(call: ast.Call) -> bool:
    given = [*call.args, *(k.value for k in call.keywords if k.arg == "mode")]
    modes = [str(x.value) for x in given if isinstance(x, ast.Constant) and isinstance(x.value, str)]
    return any(set(mode) <= set("rwaxb+") and "b" in mode for mode in modes)


def _undecided(call: ast.Call) -> bool:
    """Return whether a call opens text in the encoding of the locale."""
    keywords = {keyword.arg for keyword in call.keywords}
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("run", "Popen", "check_output") and keywords & {"text", "universal_newlines"}:
        return "encoding" not in keywords
    if isinstance(call.func, ast.Name):
        opens = name == "open"
    else:  # Path.open takes a mode or nothing; the `open` of other objects takes something else
        first = call.args[0] if call.args else None
        mode = first.value if isinstance(first, ast.Constant) else None
        opens = name in OPENING or (name == "open" and isinstance(mode, str) and set(mode) <= set("rwaxbt+"))
    return opens and "encoding" not in keywords and not _is_binary(call)


def test_every_text_file_is_opened_as_utf8():
    found = []
    for folder in ("rlhf", "plugins", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
            found += [f"{path.relative_to(ROOT)}:{call.lineno}" for call in calls if _undecided(call)]
    assert not found


@pytest.mark.parametrize(
    ("code", "undecided"),
    [
        ("open(p)", True), ("open(p, 'wb')", False), ("p.read_text()", True), ("p.read_text(encoding='utf-8')", False),
        ("p.open('a')", True), ("p.open('rb')", False), ("file.open(force)", False), ("run(c, text=True)", True),
    ],
)  # fmt: skip
def test_undecided_encodings_are_detected(code, undecided):
    (call,) = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert _undecided(call) == undecided


@pytest.mark.parametrize(
    ("locale", "again"), [("ascii", True), ("iso8859-1", True), ("utf-8", False), ("UTF-8", False)]
)
def test_another_locale_restarts_the_command_in_utf8_mode(monkeypatch, locale, again):
    started = []
    monkeypatch.setattr("locale.getpreferredencoding", lambda _: locale)
    monkeypatch.setattr(os, "execv", lambda program, words: started.append((program, words)))
    monkeypatch.setenv("PYTHONUTF8", "0")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "rlhf.cli", "runs"])
    main._ensure_utf8()
    assert started == ([(sys.executable, [sys.executable, "-m", "rlhf.cli", "runs"])] if again else [])
    assert os.environ["PYTHONUTF8"] == ("1" if again else "0")


def test_a_command_in_the_c_locale_reads_and_prints_utf8(tmp_path: Path):
    # Neither torch nor Lightning is imported here, so the process costs little.
    place = tmp_path / "grüße" / "sft" / "aa11"
    place.mkdir(parents=True)
    (place / "status.json").write_text('{"status": "failed", "error": "größer als erwartet"}', encoding="utf-8")
    (place / "config.yaml").write_text("note: größer\n", encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LC_") and k != "LANG"}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-m", "rlhf.cli", "runs", "show", str(place), "--outputs", str(tmp_path / "grüße")]
    done = subprocess.run(words, capture_output=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert b"gr??er als erwartet" in done.stdout and b"note: gr??er" in done.stdout


def test_commands_are_printed_with_shell_quoting(capsys):
    folder = Path("my outputs/sft/a b's")
    command = shell("rlhf", "report", folder, "--to", "DIRECTORY")
    assert shlex.split(command) == ["rlhf", "report", str(folder), "--to", "DIRECTORY"]
    console.print_next_commands([(command, "curves")])
    assert shlex.split(capsys.readouterr().out.splitlines()[1], comments=True) == shlex.split(command)


def test_no_command_is_formatted_without_quoting():
    # f"rlhf report {folder}": a path with a space would be two words.
    for path in [*(ROOT / "rlhf").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]:
        if path.name in ("inspect.py", "export.py"):  # a page's name; a file that is quoted earlier
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                for text, value in zip(node.values, node.values[1:], strict=False):
                    if isinstance(text, ast.Constant) and isinstance(value, ast.FormattedValue):
                        last = str(text.value).rpartition("`")[2].rpartition("\n")[2].strip()
                        assert not (last.startswith("rlhf ") and not last.endswith(("=", "."))), f"{path}:{node.lineno}"
