"""Errors of Hydra and OmegaConf as one line that says what to type."""

import re
import traceback
from collections.abc import Iterator
from difflib import get_close_matches

from hydra import compose, initialize_config_dir
from hydra._internal import config_loader_impl, config_repository, defaults_list
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from rlhf import discovery
from rlhf.config import leaves
from rlhf.errors import RLHFError, first_line, os_error_line, suggest

_AT_THE_ROOT = ("pipeline", "experiment", "sweep", "debug")
_OF_THE_USER = (HydraException, OmegaConfBaseException, OSError, YAMLError)
_CHOICE = re.compile(r"(stage|pipeline|experiment)=")


def user_fixable(error: BaseException) -> bool:
    """Whether the command line or a YAML file is at fault, and not the program."""
    if isinstance(error, RLHFError):
        return error.exit_code == 2
    return isinstance(error, _OF_THE_USER) or _while_composing(error) is not None


def explain(error: BaseException, argv: list[str]) -> str:
    """What went wrong, in one line for each finding.

    Args:
        error: What was raised.
        argv: The command line, where the words that are wrong stand.
    """
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, RLHFError):
            return str(link)
    if isinstance(error, OSError) and not isinstance(error, HydraException):  # a missing option is both
        return f"{os_error_line(error)}; check the path, its permissions and the free space"
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
    """Return what is wrong with the YAML files, or words, at which Hydra raised an error of Python's own; else None.

    Whatever is raised between our call of Hydra and the first line of a task or a check of ours is the user's to fix.
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
    # The group as it was typed, with @package.
    typed = next((w.split("=")[0] for w in argv if re.match(rf"\+?{re.escape(group)}(@[^=]*)?=", w)), group)
    elsewhere = _in_other_groups(option, group, typed.partition("@")[2])
    if elsewhere and option not in options:
        return f"{typed}={option}: no such option; {option} is {' or '.join(elsewhere)}"
    return f"{typed}={option}: no such option{suggest(option, options)}"


def _in_other_groups(option: str, group: str, package: str) -> list[str]:
    """What to type for an option that another group has: ``an objective: type stage@align=dpo objective@...=ipo``."""
    found = []
    for other in sorted(discovery.group_names() - {group, "hydra"}):
        path = next((path for path in discovery.named(other) if path.stem == option), None)
        if path is None:
            continue
        words = [f"{other}={option}"]
        if group == "stage" and other not in _AT_THE_ROOT:
            # Options of a plugin are for the stages beside them; the stage that carries the plugin's name comes first.
            stages = sorted(stage.stem for stage in path.parents[1].glob("stage/*.yaml"))
            plugin = path.parents[2].name.removeprefix("rlhf_")
            stage = plugin if plugin in stages else next(iter(stages), "")
            at = f"@{package}" if package else ""
            inside = f"@{package}.{other}" if package else ""
            words = [f"stage{at}={stage}"] * bool(stage) + [f"{other}{inside}={option}"]
        article = "an" if other[0] in "aeio" else "a"
        found.append(f"{article} {other}: type {' '.join(words)}")
    return found


def _omegaconf(error: OmegaConfBaseException, argv: list[str]) -> str:
    key = str(error.full_key or "")
    reason = first_line(error)
    if "is not in struct" in reason:
        parent = error.parent_node
        keys = [str(k) for k in parent] if isinstance(parent, DictConfig) else []
        above, _, word = key.rpartition(".")
        if above:
            return f"{key}: unknown option{_meant(word, keys, parent, above)}"
        return _unknown_root(key, keys, argv, parent)
    if isinstance(error, InterpolationResolutionError) and not key:
        return reason
    return f"{key}: {reason}" if key and not reason.startswith(key) else reason


def _meant(word: str, keys: list[str], parent: object, above: str = "") -> str:
    """The end of a message about an unknown key: keys of that name elsewhere, or the likeliest one nearby.

    Args:
        word: The unknown key, without what is before its last dot.
        keys: Those that are known in the same place.
        parent: The node of that place.
        above: Its dotted key, "" for the root.
    """
    prefix = f"{above}." if above else ""
    below = [f"{prefix}{path}" for path in _paths(parent)]
    anywhere = _paths(parent._get_root()) if isinstance(parent, DictConfig) and above else []
    for paths in (below, anywhere):
        same = sorted((path for path in paths if path.rpartition(".")[2] == word), key=lambda path: path.count("."))
        if same:
            return f" (did you mean {' or '.join(same[:3])}?)"
    names = [path.rpartition(".")[2] for path in below]
    close = get_close_matches(word, dict.fromkeys([*keys, *names]), n=1, cutoff=0.5)
    if close and close[0] not in keys:
        return f" (did you mean {min(below, key=lambda path: (path.rpartition('.')[2] != close[0], path.count('.')))}?)"
    return suggest(word, [key for key in keys if key not in ("hydra", "_target_", "_partial_")], prefix)


def _paths(node: object) -> list[str]:
    """Dotted keys of all values below a node, those of ``hydra`` left out."""
    content = OmegaConf.to_container(node) if isinstance(node, DictConfig) else {}
    assert isinstance(content, dict)
    return [path for path, _ in leaves({key: value for key, value in content.items() if key != "hydra"})]


def _unknown_root(key: str, keys: list[str], argv: list[str], root: object = None) -> str:
    """A key at the root that the chosen stage or pipeline does not have."""
    word = next((w for w in argv if w.lstrip("+~").split("=")[0].split(".")[0] == key), key)
    value = word.partition("=")[2] or "..."
    below = word.lstrip("+~").split("=")[0].removeprefix(key)
    inside = f"{key}{below}"
    owners = [(step, config) for step, config in _steps(argv) if key in config]
    exact = [step for step, config in owners if OmegaConf.select(config, inside) is not None]
    steps = [f"{step}.{inside}={value}" for step in exact or [step for step, _ in owners]]
    if steps:
        return f"{word}: a pipeline's steps have their own; type {' or '.join(steps)}"
    if key in discovery.group_names():
        chosen = next((w for w in argv if _CHOICE.match(w)), None)
        if chosen is None:
            return f"{key}: no stage is chosen that has it; type stage=NAME or pipeline=NAME before it"
        return f"{key}: {chosen} has no such group{suggest(key, keys)}"
    return f"{key}: unknown option{_meant(key, sorted({*keys, *discovery.group_names()} - {'hydra'}), root)}"


def _composition(text: str, argv: list[str]) -> str:
    line = next((x for x in text.splitlines() if x.strip()), text)
    override = re.match(r"Could not override '([^']+)'", line)
    if override:
        group, _, package = override[1].partition("@")
        word = next((w for w in argv if re.match(rf"{re.escape(override[1])}=", w)), override[1])
        option = word.partition("=")[2] or "OPTION"
        steps = [step for step, config in _steps(argv) if isinstance(config.get(group), DictConfig)]
        if package:
            places = [f"{step}.{group}" for step in steps]
            return f"{word}: nothing to override there{suggest(package, places, f'{group}@')}"
        if steps:
            choices = " or ".join(f"{group}@{step}.{group}={option}" for step in steps)
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


def _steps(argv: list[str]) -> Iterator[tuple[str, DictConfig]]:
    """The steps of the pipeline on the command line, as they stand without any other override."""
    chosen = [w for w in argv if _CHOICE.match(w) and not w.startswith("stage=") and "," not in w]
    if not chosen:
        return
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(discovery.conf_dir()), version_base="1.3"):
            config = compose("config", overrides=chosen)
    except (HydraException, OmegaConfBaseException):
        return
    for step in OmegaConf.select(config, "steps") or []:
        if isinstance(config.get(step), DictConfig):
            yield step, config[step]
