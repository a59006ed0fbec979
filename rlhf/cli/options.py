"""Command-line options shared by several commands, each with the same name and meaning everywhere."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from rlhf.errors import UserError


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line with exit status 2, without the usage page."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage and ending the process."""
        raise UserError(f"{self.prog}: {message}", fix=f"type {self.prog} --help")


def outputs(parser: argparse.ArgumentParser) -> None:
    """Add --outputs, the directory of all runs."""
    what = "directory of all results (default: outputs)"
    parser.add_argument("--outputs", type=_folder, default=Path("outputs"), metavar="FOLDER", help=what)


def sampling(
    parser: argparse.ArgumentParser, default: float, max_new_tokens: int | None, description: str = ""
) -> None:
    """Add the options of sampling, named as in transformers' generation config, spelled with - or _."""
    longest(parser, max_new_tokens, description)
    temperature(parser, default)
    what = "sample only from the K most likely tokens (default: all)"
    _both(parser, "--top-k", type=_whole(0), default=0, metavar="K", help=what)
    _both(
        parser,
        "--top-p",
        type=_share,
        default=1.0,
        metavar="P",
        help="sample only from the most likely tokens with total probability P (default: 1, all)",
    )
    seed(parser)


def longest(parser: argparse.ArgumentParser, default: int | None, description: str = "") -> None:
    """Add --max-new-tokens, the maximum length of a response in tokens; describe a default that is not a number."""
    what = f"maximum length of a response in tokens (default: {default or description})"
    _both(parser, "--max-new-tokens", type=_whole(1), default=default, metavar="N", help=what)


def temperature(parser: argparse.ArgumentParser, default: float) -> None:
    """Add --temperature, the sampling temperature."""
    what = f"divides the logits; 0 selects the most likely token (default: {default})"
    parser.add_argument("--temperature", type=_number(0), default=default, metavar="T", help=what)


def seed(parser: argparse.ArgumentParser) -> None:
    """Add --seed, the seed of sampling."""
    parser.add_argument("--seed", type=_whole(0), default=0, metavar="S", help="seed of the sampling (default: 0)")


def chat_template(parser: argparse.ArgumentParser, whose: str) -> None:
    """Add --chat-template, the template for models that have none."""
    what = (
        f"chat template for {whose} whose tokenizer has none: plain, chatml, llama2, llama3, zephyr or a Jinja file, "
        "as model.chat_template in training; a model's own template is never replaced"
    )
    _both(parser, "--chat-template", metavar="NAME|FILE", help=what)


def batch_size(parser: argparse.ArgumentParser, default: int) -> None:
    """Add --batch-size, which bounds memory and changes no response."""
    what = f"responses sampled or scored at a time; bounds memory (default: {default})"
    _both(parser, "--batch-size", type=_whole(1), default=default, metavar="N", help=what)


def count(parser: argparse.ArgumentParser, flag: str, default: int | None, help: str, most: int | None = None) -> None:
    """Add an option for a number of items, at least 1 and at most ``most``."""
    parser.add_argument(flag, type=_whole(1, most), default=default, metavar="N", help=help)


def amount(parser: argparse.ArgumentParser, flag: str, default: int, help: str) -> None:
    """Add an option for a number of items or an index, at least 0."""
    parser.add_argument(flag, type=_whole(0), default=default, metavar="N", help=help)


def _both(parser: argparse.ArgumentParser, flag: str, **hyperparameters: object) -> None:
    parser.add_argument(flag, "--" + flag[2:].replace("-", "_"), **hyperparameters)  # type: ignore[arg-type]


def _folder(text: str) -> Path:
    if not text or Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text or repr(text)} is not a directory")
    return Path(text)


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"{text} is more than {most}")
        return value

    read.__name__ = "whole number"
    return read


def _number(least: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = float(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least:g}")
        return value

    read.__name__ = "number"
    return read


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value
