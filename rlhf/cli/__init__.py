"""The commands. `rlhf.cli.main` holds the entry of `rlhf`.

A module here is a sub-command of its name when it has ``def main(argv: list[str]) -> int | None`` (None: status 0).
The first line of its docstring is its help.
"""
