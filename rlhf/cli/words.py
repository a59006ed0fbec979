"""Checks of command-line words that Hydra would reject with its usage page or a traceback: one line each instead."""

import re

from rlhf import discovery
from rlhf.errors import UserError, closest, override_error, suggest

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
                close = closest(flag, FLAGS)
                hint = f" (did you mean {close}?)" if close else ""
                fix = "type rlhf --help for a list"
                raise override_error(word, f"unknown option{hint}", fix)
            if flag in _ALONE and equals:
                raise UserError("takes no value", fix=f"type {flag}", option=flag, value=value)
            if flag in ("--info", "-i"):
                after = "".join(argv[index + 1 : index + 2])
                shown = value if equals else "" if re.search("[=-]|^$", after) else after
                if shown and shown not in _INFO:
                    raise UserError(f"no such page{suggest(shown, _INFO)}", "type --info config", flag, shown)
            if flag in ("--shell-completion", "-sc") and not {"install", "uninstall", "query"} & set(given):
                fix = "type install=bash, uninstall=bash or query=bash"
                raise UserError("needs an action", fix=fix, option=flag)
            if flag in ("--cfg", "-c"):
                shown = value if equals else "".join(argv[index + 1 : index + 2])
                if shown not in CONFIGS:
                    raise UserError(f"no such config{suggest(shown, CONFIGS)}", "type --cfg job", flag, shown)
            if flag in ("--package", "-p", "--resolve") and not {"--cfg", "-c"} & set(given):
                raise UserError("needs --cfg", fix="add --cfg job, or leave it out", option=flag)
        elif not (index and argv[index - 1] in _TAKES_A_WORD) and not _OVERRIDE.match(word):
            raise UserError(f"{word}: cannot be read as KEY=VALUE", fix="type, for example, optimizer.lr=1e-4")
        elif equals and _NO_OPTION.fullmatch(value) and flag.lstrip("+").partition("@")[0] in discovery.group_names():
            fix = f"type {flag.lstrip('+')}=OPTION (rlhf --help lists the options)"
            raise UserError(f"{value} is not the name of an option", fix=fix, option=flag, value=value)
