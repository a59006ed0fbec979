"""Conversion of any exception to an `RLHFError`; those of Hydra and OmegaConf get a fix to type.

The exceptions of Hydra and OmegaConf have no fields for most of what they report, so this module reads their sentences.
No other module does.
"""

import re
import traceback
from collections.abc import Iterator

# For the frames of a traceback: no public attribute of Hydra's errors names the YAML file that was being read.
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
from rlhf.errors import RLHFError, RunFailed, UserError, first_line, os_error_line, override_error, suggest

_OF_THE_USER = (HydraException, OmegaConfBaseException, OSError, YAMLError)
_CHOICE = re.compile(r"(stage|pipeline|experiment)=")
_PER_STEP = "each step of a pipeline has its own"
_NO_STAGE = "no stage with this group is chosen"
_ADD_STAGE = "type stage=NAME or pipeline=NAME too"


def user_fixable(error: BaseException) -> bool:
    """Return whether the command line or a YAML file caused the error, and not the program."""
    if isinstance(error, RLHFError):
        return error.exit_code == 2
    return isinstance(error, _OF_THE_USER) or _while_composing(error) is not None


def explain(error: BaseException, argv: list[str]) -> RLHFError:
    """Return an error with what is wrong and what to type; an `RLHFError` is returned as it is.

    Args:
        error: The exception.
        argv: The command line, which contains the words at fault.
    """
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, RLHFError):
            return link
    # Hydra's error for a missing option is also an OSError.
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        return UserError(os_error_line(error))
    for link in chain:
        if isinstance(link, YAMLError):
            return UserError(_yaml_problem(link), fix="correct the YAML file")
    if (composing := _while_composing(error)) is not None:
        return composing
    if not user_fixable(error):
        text = str(error).strip()
        return RunFailed(f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__)
    for link in chain:
        if isinstance(link, MissingConfigException) and link.missing_cfg_file:
            return _no_such_option(link, argv)
        if isinstance(link, OverrideParseException):
            reason = f"cannot be read as KEY=VALUE ({first_line(link)})"
            return UserError(f"{link.override}: {reason}", fix="quote special characters: 'KEY=\"a,b\"'")
    for link in chain:
        if isinstance(link, OmegaConfBaseException):
            return _omegaconf(link, argv)
    for link in chain:
        if isinstance(link, ConfigCompositionException) and str(link):
            return _composition(str(link), argv)
    return UserError(first_line(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _while_composing(error: BaseException) -> UserError | None:
    """Return an error for a plain Python error raised by Hydra while it composed the config; None for other errors.

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
        fix = "correct the YAML file, or the override that chooses it"
        return UserError(f"{place}: cannot be read ({first_line(error)})", fix=fix)
    if len(set(included)) < len(included):
        return UserError(f"{included[-1]}.yaml: its defaults list is circular", fix="remove an entry")
    return UserError(f"{read[-1]}.yaml: is nested too deeply", fix="correct the YAML file") if read else None


def _yaml_problem(error: YAMLError) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: is not YAML ({error.problem})"
    return f"the config is not YAML ({first_line(error)})"


def _no_such_option(error: MissingConfigException, argv: list[str]) -> UserError:
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    if not group:
        return UserError(first_line(error))
    options = [o for o in error.options or [] if o != "_self_"]
    # The group as typed, with its @package.
    typed = next((w.split("=")[0] for w in argv if re.match(rf"\+?{re.escape(group)}(@[^=]*)?=", w)), group)
    package = typed.partition("@")[2]
    made = suggestions.chosen([word for word in argv if not word.startswith((f"{group}=", f"{group}@"))])
    others = {} if option in options else suggestions.elsewhere(option, group, package, made)
    if others:
        problem = f"no such option ({option} is {' or '.join(others)})"
        return UserError(problem, fix=f"type {' or '.join(others.values())}", option=typed, value=option)
    hint = suggest(option, suggestions.fitting(group, package, options, made))
    return UserError(f"no such option{hint}", option=typed, value=option)


def _omegaconf(error: OmegaConfBaseException, argv: list[str]) -> UserError:
    key = str(error.full_key or "")
    reason = first_line(error)
    if "is not in struct" in reason:
        parent = error.parent_node
        keys = [str(k) for k in parent] if isinstance(parent, DictConfig) else []
        above, _, word = key.rpartition(".")
        if above:
            value = next((w.partition("=")[2] for w in argv if w.lstrip("+~").startswith(f"{key}=")), "...")
            return _unknown_key(key, suggestions.suggest_key(word, keys, parent, above, value))
        return _unknown_root(key, keys, argv, parent)
    if isinstance(error, InterpolationResolutionError) and not key:
        return UserError(reason)
    return UserError(reason, option="" if reason.startswith(key) else key)


def _unknown_key(key: str, suggestion: suggestions.Suggestion) -> UserError:
    return UserError(f"unknown option{suggestion.hint}", fix=suggestion.fix, option=key)


def _unknown_root(key: str, keys: list[str], argv: list[str], root: object = None) -> UserError:
    """Return the error for a root key that the chosen stage or pipeline does not have."""
    word = next((w for w in argv if w.lstrip("+~").split("=")[0].split(".")[0] == key), key)
    if places := suggestions.of_root_key(key, word, suggestions.chosen(argv)):
        return override_error(word, _PER_STEP, f"type {' or '.join(places)}")
    if key in discovery.group_names():
        chosen = next((w for w in argv if _CHOICE.match(w)), None)
        if chosen is None:
            return UserError(_NO_STAGE, fix=_ADD_STAGE, option=key)
        return UserError(f"{chosen} has no such group{suggest(key, keys)}", option=key)
    known = sorted({*keys, *discovery.group_names()} - {"hydra"})
    return _unknown_key(key, suggestions.suggest_key(key, known, root, "", word.partition("=")[2]))


def _composition(text: str, argv: list[str]) -> UserError:
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
                return override_error(word, f"no {group} at {package}", f"type {group}@{package}.{group}={option}")
            elif made.at_root(group):
                return override_error(word, f"{group} is a group of the root", f"type {group}={option}")
            return override_error(word, f"no {group} at {package}{suggest(package, places, f'{group}@')}")
        if places:
            choices = " or ".join(f"{group}@{place}={option}" for place in places)
            return override_error(word, _PER_STEP, f"type {choices}")
        if group in discovery.group_names() and not any(_CHOICE.match(w) for w in argv):
            return override_error(word, _NO_STAGE, _ADD_STAGE)
        if group in discovery.group_names():
            fix = f"type a stage that reads {group}, or leave it out"
            return override_error(word, f"the chosen stage has no group {group}", fix)
        return override_error(word, f"no such group{suggest(group, discovery.group_names())}")
    sweep = re.match(r"(?:Ambiguous value for argument|Sweep parameters) '([^']+)'", line)
    if sweep:
        return override_error(sweep[1], "several values are a sweep", "add -m")
    match = re.search(r"Key '([^']+)' is not in struct", text)
    if match:
        return UserError("unknown option", option=match[1])
    return UserError(line.strip())
