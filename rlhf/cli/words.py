"""Checks of command-line words that Hydra would reject with its usage page or a traceback: one line each instead."""

import re

from rlhf import discovery
from rlhf.errors import UserError, suggest

FLAGS = (  # our own and Hydra's
    *("--help", "--version", "--dry-run", "--multirun", "--run", "--cfg", "--package", "--resolve", "--info"),
    *("--config-dir", "--config-name", "--config-path", "--hydra-help", "--shell-completion"),
)
SHORT = ("-h", "-m", "-r", "-c", "-p", "-i", "-cd", "-cn", "-cp", "-sc")
CONFIGS = ("job", "hydra", "all")  # values of --cfg
_TAKES_A_WORD = ("--cfg", "-c", "--package", "-p", "--info", "-i")
_ALONE = ("--help", "--version", "--dry-run", "--multirun", "--run", "--resolve", "--hydra-help", "-h", "-m", "-r")
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")  # values of --info
# YAML reads these values as null, booleans or numbers, not as text.
_NO_OPTION = re.compile(r"(null|true|false|[-+]?[\d.]+(e[-+]?\d+)?)", re.IGNORECASE)
_OVERRIDE = re.compile(r"[+~]{0,2}[A-Za-z_][\w./@:-]*(=|$)")


def check(argv: list[str]) -> None:
    """Raise for unknown flags, for a config that cannot be shown, and for words that are not KEY=VALUE.

    Raises:
        UserError: one line, with what to type.
    """
    given = [word.partition("=")[0] for word in argv]
    for index, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if word.startswith("-"):
            if flag not in (*FLAGS, *SHORT):
                hint = suggest(flag, FLAGS)
                hint = hint if "did you" in hint else ""
                raise UserError(f"{word}: unknown option{hint}; rlhf --help lists everything")
            if flag in _ALONE and equals:
                raise UserError(f"{word}: takes no value; type {flag}")
            if flag in ("--info", "-i"):
                after = "".join(argv[index + 1 : index + 2])
                shown = value if equals else "" if re.search("[=-]|^$", after) else after
                if shown and shown not in _INFO:
                    raise UserError(f"{flag} {shown}: nothing to show{suggest(shown, _INFO)}; type --info config")
            if flag in ("--shell-completion", "-sc") and not {"install", "uninstall", "query"} & set(given):
                raise UserError(f"{word}: type it with install=bash, uninstall=bash or query=bash")
            if flag in ("--cfg", "-c"):
                shown = value if equals else "".join(argv[index + 1 : index + 2])
                if shown not in CONFIGS:
                    raise UserError(f"{flag} {shown}: no such config{suggest(shown, CONFIGS)}; type --cfg job")
            if flag in ("--package", "-p", "--resolve") and not {"--cfg", "-c"} & set(given):
                raise UserError(f"{word} is read with --cfg alone; type --cfg job beside it, or leave it out")
        elif not (index and argv[index - 1] in _TAKES_A_WORD) and not _OVERRIDE.match(word):
            raise UserError(f"{word}: cannot be read as KEY=VALUE; type, for example, optimizer.lr=1e-4")
        elif equals and _NO_OPTION.fullmatch(value) and flag.lstrip("+").partition("@")[0] in discovery.group_names():
            raise UserError(f"{word}: {value} names no option; {flag.lstrip('+')}=OPTION, rlhf --help lists them")
