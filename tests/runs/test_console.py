"""Untrusted text reaches the terminal as plain text: control characters and markup have no effect."""

import ast
import io
import sys
from pathlib import Path

import pytest

from rlhf import console
from rlhf import console as pages
from rlhf.cli import main
from tests.report.fake_runs import write_run

ROOT = Path(__file__).parents[2]
EVIL = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202egnp\u2066.\x7f"
OBEYED = set(EVIL) - set("]0;owned[2J31mgnp.")


def test_control_characters_are_replaced_by_symbols():
    assert console.clean("a\tb\n\x1b[31m\x00\r") == "a\tb\n␛[31m␀␍"
    assert console.clean("\x9b31m\u202e\u2066\x7f") == "�31m��␡"
    assert console.clean("grün 日本語 🙂 \u200f") == "grün 日本語 🙂 \u200f"


def test_streams_are_cleaned_and_restored(capsys):
    before = sys.stdout
    with console.screen(), console.screen():  # a command may run inside a command
        print(EVIL)
        print(EVIL, file=sys.stderr)
        sys.stdout.writelines(["\rredrawn ", "a\rb\n"])
    assert sys.stdout is before
    captured = capsys.readouterr()
    assert captured.out == console.clean(EVIL) + "\n\rredrawn a␍b\n" and captured.err == console.clean(EVIL) + "\n"


def test_an_unencodable_character_does_not_stop_a_run(monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    with console.screen():
        print("größer \udce4")
    ascii_only.flush()
    assert ascii_only.buffer.getvalue() == b"gr??er ?\n"


def test_tables_and_lines_show_markup_and_escapes_literally(capsys):
    with console.screen():
        pages.say(f"[red]{EVIL}[/red]", "bold")
        pages.print_table("[b]title[/b]", ("[i]head[/i]", ":smile:"), [("[red]x[/red]", EVIL), ("y", "z")])
        console.Screen(width=200).print(f"[blink]plain[/blink] {EVIL}")
    out = capsys.readouterr().out
    assert not OBEYED & set(out)
    for literal in ("[red]", "[/red]", "[b]title[/b]", "[i]head[/i]", ":smile:", "[blink]plain[/blink]"):
        assert literal in out


def test_colours_of_rlhf_reach_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    with console.screen():
        pages.say(EVIL, "red")
    assert terminal.getvalue() == f"\x1b[31m{console.clean(EVIL)}\x1b[0m\n"


@pytest.mark.parametrize("words", [["runs", "list"], ["runs", "show", "ab"], ["report", "outputs/ppo"], [f"x{EVIL}"]])
def test_commands_clean_the_text_they_read(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    run = write_run(
        Path("outputs"), "ppo", "ab12ab12ab", {"seed": 0, "note": EVIL}, {EVIL: 1.0, "gold": 0.5},
        value=1.0, headline=EVIL,
    )  # fmt: skip
    (run / "status.json").write_text('{"status": "failed", "error": "\\u001b[31mowned", "started": "\\u001b[2J"}')
    main.run(words)
    captured = capsys.readouterr()
    assert captured.out + captured.err and not OBEYED & set(captured.out + captured.err)


def test_every_module_uses_the_cleaned_console():
    # A plain rich console would interpret markup in data and print its escapes.
    for path in [*(ROOT / "rlhf").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]:
        if path == ROOT / "rlhf/console.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.module == "rich.console"), path
            assert not (isinstance(node, ast.ImportFrom) and node.module == "rich" and node.names[0].name == "print")
