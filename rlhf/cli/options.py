"""Command-line options shared by several commands, each with the same name and meaning everywhere."""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, NoReturn

from rlhf.errors import UserError


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line with exit status 2, without the usage page."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage and ending the process."""
        raise UserError(f"{self.prog}: {message}", fix=f"type {self.prog} --help")


def outputs(parser: argparse.ArgumentParser) -> None:
    """Add --outputs, the directory of all runs."""
    what = "directory of all results (default: outputs)"
    parser.add_argument("--outputs", type=_folder, default=Path("outputs"), metavar="DIRECTORY", help=what)


def sampling(
    parser: argparse.ArgumentParser, default: float, max_new_tokens: int | None, description: str = ""
) -> None:
    """Add the options of sampling, named as in transformers' generation config, spelled with - or _."""
    longest(parser, max_new_tokens, description)
    temperature(parser, default)
    what = "sample only from the K most likely tokens (default: all)"
    _both(parser, "--top-k", type=_number(int, ge=0), default=0, metavar="K", help=what)
    _both(
        parser,
        "--top-p",
        type=_number(float, gt=0, le=1),
        default=1.0,
        metavar="P",
        help="sample only from the most likely tokens with total probability P (default: 1, all)",
    )
    seed(parser)


def longest(parser: argparse.ArgumentParser, default: int | None, description: str = "") -> None:
    """Add --max-new-tokens, the maximum length of a response in tokens; describe a default that is not a number."""
    what = f"maximum length of a response in tokens (default: {default or description})"
    _both(parser, "--max-new-tokens", type=_number(int, ge=1), default=default, metavar="N", help=what)


def temperature(parser: argparse.ArgumentParser, default: float) -> None:
    """Add --temperature, the sampling temperature."""
    what = f"divides the logits; 0 selects the most likely token (default: {default})"
    parser.add_argument("--temperature", type=_number(float, ge=0), default=default, metavar="T", help=what)


def seed(parser: argparse.ArgumentParser) -> None:
    """Add --seed, the seed of sampling."""
    what = "seed of the sampling (default: 0)"
    parser.add_argument("--seed", type=_number(int, ge=0), default=0, metavar="S", help=what)


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
    _both(parser, "--batch-size", type=_number(int, ge=1), default=default, metavar="N", help=what)


def count(
    parser: argparse.ArgumentParser,
    flag: str,
    default: int | None,
    help: str,
    most: int | None = None,
    least: int = 1,
) -> None:
    """Add an option for a number of items, at least ``least`` and at most ``most``."""
    parser.add_argument(flag, type=_number(int, ge=least, le=most), default=default, metavar="N", help=help)


def amount(parser: argparse.ArgumentParser, flag: str, default: int, help: str) -> None:
    """Add an option for a number of items or an index, at least 0."""
    parser.add_argument(flag, type=_number(int, ge=0), default=default, metavar="N", help=help)


def confirm_removal(lines: Iterable[str], yes: bool) -> bool:
    """Print what will be removed and return whether it may be; without ``yes`` a person at a terminal is asked."""
    for line in lines:
        print(line)
    if yes or (sys.stdin.isatty() and input("remove? [y/N] ").strip().lower() in ("y", "yes")):
        return True
    print("nothing removed" + ("" if sys.stdin.isatty() else "; type --yes to remove without confirmation"))
    return False


def _both(parser: argparse.ArgumentParser, flag: str, **hyperparameters: object) -> None:
    parser.add_argument(flag, "--" + flag[2:].replace("-", "_"), **hyperparameters)  # type: ignore[arg-type]


def _folder(text: str) -> Path:
    if not text or Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text or repr(text)} is not a directory")
    return Path(text)


def _number(kind: type[int] | type[float], **bounds: Any) -> Callable[[str], Any]:
    """Return the parser of a number within bounds, given as to pydantic's Field: ge, gt, le."""

    def read(text: str) -> Any:
        from pydantic import ConfigDict, Field, TypeAdapter, ValidationError  # slow, and most commands parse no number

        bounded: Any = Annotated[kind, Field(**bounds)]
        try:
            return TypeAdapter(bounded, config=ConfigDict(allow_inf_nan=False)).validate_python(text)
        except ValidationError as error:
            problem = error.errors()[0]["msg"].replace("Input", text or repr(text), 1)
            raise argparse.ArgumentTypeError(problem) from None

    return read
