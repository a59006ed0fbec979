"""Errors of Hydra and OmegaConf as one line that says what to type."""

import re
import traceback
from collections.abc import Iterator

from hydra._internal import config_loader_impl, config_repository, defaults_list
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from rlhf import discovery
from rlhf.cli import suggestions
from rlhf.errors import RLHFError, first_line, os_error_line, suggest

_OF_THE_USER = (HydraException, OmegaConfBaseException, OSError, YAMLError)
_CHOICE = re.compile(r"(stage|pipeline|experiment)=")


def user_fixable(error: BaseException) -> bool:
    """Return whether the command line or a YAML file caused the error, and not the program."""
    if isinstance(error, RLHFError):
        return error.exit_code == 2
    return isinstance(error, _OF_THE_USER) or _while_composing(error) is not None


def explain(error: BaseException, argv: list[str]) -> str:
    """Return an error as text, one line for each problem.

    Args:
        error: The exception.
        argv: The command line, which contains the words at fault.
    """
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, RLHFError):
            return str(link)
    # Hydra's error for a missing option is also an OSError.
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        return os_error_line(error)
    for link in chain:
        if isinstance(link, YAMLError):
            return f"{_yaml_error(link)}; correct the YAML file"
    if (composing := _while_composing(error)) is not None:
        return composing
    if not user_fixable(error):
        text = str(error).strip()
        return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
    for link in chain:
        if isinstance(link, MissingConfigException) and link.missing_cfg_file:
            return _no_such_option(link, argv)
        if isinstance(link, OverrideParseException):
            reason = f"cannot be read as KEY=VALUE ({first_line(link)})"
            return f"{link.override}: {reason}; quote special characters: 'KEY=\"a,b\"'"
    for link in chain:
        if isinstance(link, OmegaConfBaseException):
            return _omegaconf(link, argv)
    for link in chain:
        if isinstance(link, ConfigCompositionException) and str(link):
            return _composition(str(link), argv)
    return first_line(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _while_composing(error: BaseException) -> str | None:
    """Return a message for a plain Python error raised by Hydra while it composed the config; None for other errors.

    An error raised between our call of Hydra and the first frame of our own code is caused by YAML files or arguments.
    """
    if isinstance(error, _OF_THE_USER):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [str(frame.f_globals.get("__name__")).partition(".")[0] == "rlhf" for frame in frames]
    frames = frames[max((index for index, is_own in enumerate(own) if is_own), default=-1) + 1 :]
    if all(frame.f_code.co_filename != config_loader_impl.__file__ for frame in frames):
        return None
    included, read = (
        [
            str(frame.f_locals[name])
            for frame in frames
            if frame.f_code.co_filename == module.__file__ and name in frame.f_locals
        ]
        for module, name in ((defaults_list, "path"), (config_repository, "config_path"))
    )
    if not isinstance(error, RecursionError):
        place = f"{read[-1]}.yaml" if read else "the config"
        return f"{place}: cannot be read ({first_line(error)}); correct the YAML file, or the word that chooses it"
    if len(set(included)) < len(included):
        return f"{included[-1]}.yaml: its defaults list leads back to itself; take the entry out"
    return f"{read[-1]}.yaml: nested too deeply to be read; correct the YAML file" if read else None


def _yaml_error(error: YAMLError) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: not YAML ({error.problem})"
    return f"not YAML ({first_line(error)})"


def _no_such_option(error: MissingConfigException, argv: list[str]) -> str:
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    if not group:
        return first_line(error)
    options = [o for o in error.options or [] if o != "_self_"]
    # The group as typed, with its @package.
    typed = next((w.split("=")[0] for w in argv if re.match(rf"\+?{re.escape(group)}(@[^=]*)?=", w)), group)
    package = typed.partition("@")[2]
    other = [] if option in options else suggestions.elsewhere(option, group, package, argv)
    if other:
        return f"{typed}={option}: no such option; {option} is {' or '.join(other)}"
    return f"{typed}={option}: no such option{suggest(option, suggestions.fitting(group, package, options, argv))}"


def _omegaconf(error: OmegaConfBaseException, argv: list[str]) -> str:
    key = str(error.full_key or "")
    reason = first_line(error)
    if "is not in struct" in reason:
        parent = error.parent_node
        keys = [str(k) for k in parent] if isinstance(parent, DictConfig) else []
        above, _, word = key.rpartition(".")
        if above:
            value = next((w.partition("=")[2] for w in argv if w.lstrip("+~").startswith(f"{key}=")), "...")
            return f"{key}: unknown option{suggestions.suggest_key(word, keys, parent, above, value)}"
        return _unknown_root(key, keys, argv, parent)
    if isinstance(error, InterpolationResolutionError) and not key:
        return reason
    return f"{key}: {reason}" if key and not reason.startswith(key) else reason


def _unknown_root(key: str, keys: list[str], argv: list[str], root: object = None) -> str:
    """Return the message for a root key that the chosen stage or pipeline does not have."""
    word = next((w for w in argv if w.lstrip("+~").split("=")[0].split(".")[0] == key), key)
    if instead := suggestions.of_root_key(key, word, suggestions.chosen(argv)):
        return f"{word}: a pipeline's steps have their own; type {instead}"
    if key in discovery.group_names():
        chosen = next((w for w in argv if _CHOICE.match(w)), None)
        if chosen is None:
            return f"{key}: no stage is chosen that has it; type stage=NAME or pipeline=NAME before it"
        return f"{key}: {chosen} has no such group{suggest(key, keys)}"
    known = sorted({*keys, *discovery.group_names()} - {"hydra"})
    return f"{key}: unknown option{suggestions.suggest_key(key, known, root, '', word.partition('=')[2])}"


def _composition(text: str, argv: list[str]) -> str:
    line = next((x for x in text.splitlines() if x.strip()), text)
    override = re.match(r"Could not override '([^']+)'", line)
    if override:
        group, _, package = override[1].partition("@")
        word = next((w for w in argv if re.match(rf"{re.escape(override[1])}=", w)), override[1])
        option = word.partition("=")[2] or "OPTION"
        made = suggestions.chosen(argv)
        places = list(suggestions.groups_of(group, option, made))
        if package:
            if group == "stage":
                places = list(made.steps)
            elif f"{package}.{group}" in places:
                return f"{word}: nothing to override there; type {group}@{package}.{group}={option}"
            elif made.at_root(group):
                return f"{word}: nothing to override there; the group is at the root: type {group}={option}"
            return f"{word}: nothing to override there{suggest(package, places, f'{group}@')}"
        if places:
            choices = " or ".join(f"{group}@{place}={option}" for place in places)
            return f"{word}: a pipeline's steps have their own; type {choices}"
        if group in discovery.group_names() and not any(_CHOICE.match(w) for w in argv):
            return f"{word}: no stage is chosen that has this group; type stage=NAME or pipeline=NAME before it"
        if group in discovery.group_names():
            return f"{word}: the chosen stage has no group {group}; name a stage that has, or leave it out"
        return f"{word}: no such group{suggest(group, discovery.group_names())}"
    sweep = re.match(r"(?:Ambiguous value for argument|Sweep parameters) '([^']+)'", line)
    if sweep:
        return f"{sweep[1]}: several values are a sweep; add -m"
    match = re.search(r"Key '([^']+)' is not in struct", text)
    if match:
        return f"{match[1]}: unknown option"
    return line.strip()
