"""Command-line interface: `rlhf.cli.main` is the entry point of `rlhf`.

A module of this package is the sub-command of its name if it has ``def main(argv: list[str]) -> int | None`` (None:
status 0). The first line of its docstring is its help text.
"""
