"""Tab completion: Hydra's, plus commands, runs, steps of a pipeline, and the objectives that a stage takes."""

import re
from collections.abc import Iterator
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.plugins.completion_plugin import DefaultCompletionPlugin
from omegaconf import OmegaConf

from rlhf import discovery
from rlhf.cli import cache, suggestions
from rlhf.cli.help import LEADING, subcommands
from rlhf.runs import run_directory

_VERBS = {
    "cache": ("list", "rm"),
    "inspect": ("data", "batch", "template", "plan"),
    "plugins": ("list", "show", "new", "check"),
    "runs": ("list", "show", "rm", "check"),
}
_TAKES_A_RUN = ("chat", "eval", "export", "generate", "report")
_READS_A_RUN = re.compile(r"(?:\w+\.)*(?:inputs\.\w+|source)=")


def query(shell: str, line: str) -> str:
    """Return the possible next words, in the format of the shell's completion script.

    Args:
        shell: bash, zsh or fish.
        line: The command line so far, starting with the program's name.
    """
    found = sorted(dict.fromkeys(candidates(line.partition(" ")[2])))
    return ("\n" if shell == "fish" else " ").join(found)


def candidates(line: str) -> Iterator[str]:
    """Yield the possible completions of a command line, which is given without the program's name."""
    words = line.split()
    word = "" if not line or line.endswith(" ") else words.pop()
    known = subcommands()
    if words and words[0] in known:
        yield from _of_command(words, word)
        return
    if not words:
        yield from (name for name in known if name.startswith(word))
        yield from (f"{group}=" for group in LEADING if group.startswith(word))
    key, equals, value = word.partition("=")
    if equals and key == "until":
        yield from (f"until={step}" for step in _steps(words) if step.startswith(value))
    elif equals and _READS_A_RUN.match(word):
        yield from (f"{key}={path}" for path in _runs(value))
    else:
        fitting = _fitting(words, key) if equals and key.partition("@")[0] == "objective" else None
        for found in _by_hydra(line):
            if fitting is None or found.partition("=")[2] in fitting:
                yield found


def _of_command(words: list[str], word: str) -> Iterator[str]:
    name, rest = words[0], [one for one in words[1:] if not one.startswith("-")]
    if name in _VERBS and not rest:
        yield from (verb for verb in _VERBS[name] if verb.startswith(word))
    elif name == "inspect":
        yield from candidates(" ".join([*rest[1:], word]))
    elif name == "plugins" and rest[0] == "show":
        yield from (plugin.name for plugin in discovery.discover()[0] if plugin.name.startswith(word))
    elif name == "cache" and rest[0] == "rm":
        yield from (entry.name for entry in cache.entries() if entry.name.startswith(word))
    elif name in _TAKES_A_RUN or (name == "runs" and rest[0] != "list"):
        yield from _runs(word)


def _runs(beginning: str) -> Iterator[str]:
    """Yield the directories of finished runs in ./outputs whose path starts with ``beginning``."""
    for run in run_directory.find(Path("outputs")):
        if str(run.folder).startswith(beginning):
            yield str(run.folder)


def _steps(words: list[str]) -> list[str]:
    chosen = [word for word in words if word.startswith(("pipeline=", "experiment="))]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(discovery.conf_dir()), version_base="1.3"):
            return [str(step) for step in OmegaConf.select(compose("config", chosen), "steps") or ()]
    except Exception:  # an unfinished line rarely composes
        return []


def _fitting(words: list[str], key: str) -> set[str] | None:
    """Return the objectives that the chosen stage takes; None if that is unknown."""
    step = key.partition("@")[2].partition(".")[0]
    made = suggestions.chosen(words)
    config = made.steps.get(step) if step else made.config
    return None if config is None else suggestions.objectives(config) or None


def _by_hydra(line: str) -> list[str]:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(discovery.conf_dir()), version_base="1.3"):
            plugin = DefaultCompletionPlugin(GlobalHydra.instance().config_loader())
            # The public method reads the line from the environment and prints the words.
            return list(plugin._query(config_name="config", line=line))
    except Exception:  # an unfinished line rarely composes
        return []
