"""Suggestions for an unknown option or key: words that compose at the place where they are typed."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf import discovery
from rlhf.errors import suggest
from rlhf.storage.plain import leaves

WHOLE = ("stage", "pipeline", "experiment")  # groups whose options make a config runnable
_BESIDE = ("debug", "sweep")  # root groups that every stage and pipeline accepts
_ALIKE = 0.8  # minimum similarity of a key elsewhere in the config; the limit is lower for a key in the same place


@dataclass(frozen=True)
class Suggestion:
    """Suggestion for an unknown key.

    Attributes:
        hint: End of the problem, such as " (did you mean optimizer.lr?)".
        fix: What to type instead; "" if the hint is enough.
    """

    hint: str
    fix: str = ""


@dataclass(frozen=True)
class Chosen:
    """Stage or pipeline of a command line, composed without the other words.

    Attributes:
        config: The config; empty if none is chosen.
        stages: Step -> its option of the group stage; a single stage has the key "".
    """

    config: DictConfig = field(default_factory=lambda: OmegaConf.create({}))
    stages: dict[str, str] = field(default_factory=dict)

    @property
    def steps(self) -> dict[str, DictConfig]:
        """Return the steps of a pipeline with their configs, in order; empty for a single stage."""
        names = [str(name) for name in self.config.get("steps") or []]
        return {name: self.config[name] for name in names if isinstance(self.config.get(name), DictConfig)}

    def at_root(self, group: str) -> bool:
        """Return whether a group is chosen for the whole command, and not for one of its steps."""
        return isinstance(self.config.get(group), DictConfig) or (group in _BESIDE and bool(self.config))


def chosen(argv: list[str]) -> Chosen:
    """Compose the stage or pipeline that a command line names, without its swapped stages if these do not compose."""
    whole = [word for word in argv if word.startswith(tuple(f"{group}=" for group in WHOLE)) and "," not in word]
    swapped = [word for word in argv if word.startswith("stage@") and "," not in word]
    for words in ([*whole, *swapped], whole):
        if not whole:
            break
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(discovery.conf_dir()), version_base="1.3"):
                config = compose("config", overrides=words, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException):
            continue
        options = config.hydra.runtime.choices.items()
        return Chosen(config, {str(k).partition("@")[2]: str(v) for k, v in options if str(k).split("@")[0] == "stage"})
    return Chosen()


def objectives(config: DictConfig) -> set[str]:
    """Return the objectives that a stage takes: those of its plugin, and those of plugins without a stage.

    Args:
        config: Config of the stage; without an objective the result is empty.
    """
    package = str(OmegaConf.select(config, "objective._target_") or "").partition(".")[0]
    theirs = {plugin.package for plugin in discovery.discover()[0] if any((plugin.conf / "stage").glob("*.yaml"))}
    owners = {path: _package(path) for path in discovery.named("objective")} if package else {}
    return {path.stem for path, owner in owners.items() if owner == package or owner not in {*theirs, "rlhf"}}


def _package(option: Path) -> str:
    """Return the package that provides an option; "" for one of the user's own ./conf."""
    conf = option.parents[1]
    if conf == discovery.conf_dir():
        return "rlhf"
    return "" if conf == discovery.user_conf() else conf.parent.name


def fitting(group: str, package: str, names: list[str], made: Chosen) -> list[str]:
    """Return the options of a group that the stage at this place takes; all options if that is unknown."""
    if group != "objective":
        return names
    takes = objectives(made.steps.get(package.partition(".")[0], made.config))
    return [name for name in names if name in takes] or names


def elsewhere(option: str, group: str, package: str, made: Chosen) -> dict[str, str]:
    """Return the groups that have an option -> words to type: "an objective" -> "stage=dpo objective=ipo"."""
    homes = {
        other: path for other in sorted(discovery.group_names() - {group, "hydra"}) if (path := _of(other, option))
    }
    if "stage" in homes:  # a stage brings the objective of its name
        homes.pop("objective", None)
    typed = {other: _words(other, path, group, package, made) for other, path in homes.items()}
    return {_noun(other): words for other, words in typed.items() if words}


def _of(group: str, option: str) -> Path | None:
    return next((path for path in discovery.named(group) if path.stem == option), None)


def _noun(group: str) -> str:
    return "a data set" if group == "data" else f"{'an' if group[0] in 'aeio' else 'a'} {group}"


def _words(other: str, path: Path, group: str, package: str, made: Chosen) -> str:
    """Return the words that choose an option of another group; "" if the chosen stage or pipeline cannot take it."""
    option, step = f"{other}={path.stem}", package.partition(".")[0]
    if other in WHOLE:
        return option if not step else ""
    if made.at_root(other) and not (other == "objective" and path.stem not in objectives(made.config)):
        return option + (" -m" if other == "sweep" else "")
    stages = sorted(stage.stem for stage in path.parents[1].glob("stage/*.yaml"))
    plugin = _package(path).removeprefix("rlhf_")
    stage = plugin if plugin in stages else next(iter(stages), "") if plugin != "rlhf" else ""
    if step in made.steps:
        if group == "stage" and other == "objective" and stage:
            return f"stage@{step}={stage} objective@{step}.{option}"
        fits = other != "objective" or path.stem in objectives(made.steps[step])
        return f"{other}@{step}.{option}" if isinstance(made.steps[step].get(other), DictConfig) and fits else ""
    if made.config:
        return ""
    return f"stage={(stage if other == 'objective' else '') or 'NAME'} {option}{' -m' if other == 'sweep' else ''}"


def suggest_key(word: str, keys: list[str], parent: Any, above: str, value: str) -> Suggestion:
    """Return the suggestion for an unknown key.

    Args:
        word: The key, without the part before its last dot.
        keys: The known keys in the same place.
        parent: The node of that place.
        above: The node's dotted key, "" for the root.
        value: The value typed for the key.
    """
    prefix = f"{above}." if above else ""
    root = parent._get_root() if isinstance(parent, DictConfig) else None
    if above and isinstance(root, DictConfig) and isinstance(root.get(word), DictConfig) and _of(word, value):
        return Suggestion(f" ({word} is the same for all steps)", f"type {word}={value}")
    # A parent that holds a stage is a step of a pipeline.
    if isinstance(root, DictConfig) and "stage" in parent and isinstance(root.get(word), int | float):
        return Suggestion(f" ({word} is set for all steps)", f"type +{above}.{word}={value} to set it for one step")
    below = [f"{prefix}{path}" for path in _paths(parent)]
    for paths in (below, _paths(root) if above else []):
        same = sorted((path for path in paths if path.rpartition(".")[2] == word), key=lambda path: path.count("."))
        if same:
            return Suggestion(f" (did you mean {' or '.join(same[:3])}?)")
    if other := _in_other_options(word, above, value, parent):
        return other
    names = dict.fromkeys(path.rpartition(".")[2] for path in below)
    initials = "".join(part[:1] for part in word.split("_")) if "_" in word else word  # learning_rate -> lr
    close = get_close_matches(word, names, n=1, cutoff=_ALIKE) or [name for name in names if name == initials]
    if close and close[0] not in keys:
        nearest = min(below, key=lambda path: (path.rpartition(".")[2] != close[0], path.count(".")))
        return Suggestion(f" (did you mean {nearest}?)")
    return Suggestion(suggest(word, [key for key in keys if key not in ("hydra", "_target_", "_partial_")], prefix))


def _in_other_options(word: str, above: str, value: str, parent: Any) -> Suggestion | None:
    """Return the suggestion for a key that other options of its group have: `adapter.rank`, with adapter=none."""
    if not above:
        having = [str(group) for group in sorted(parent or ()) if _of(str(group), word) is not None]
        return Suggestion(f" ({word} is {_noun(having[0])})", f"type {having[0]}={word}") if having else None
    group = above.rpartition(".")[2]
    if group not in discovery.group_names():
        return None
    stage = parent._get_parent() if isinstance(parent, DictConfig) else None
    takes = objectives(stage) if group == "objective" and isinstance(stage, DictConfig) else None
    options = (path for path in discovery.named(group) if takes is None or path.stem in takes)
    having = [path.stem for path in options if word in _top_keys(path)]
    at = f"{group}@{above}" if "." in above else group
    if not having:
        return None
    return Suggestion(f" (only {at}={', '.join(having)} has it)", f"type {at}={having[0]} {above}.{word}={value}")


def _top_keys(path: Path) -> set[str]:
    try:
        content = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return set()
    return set(map(str, content)) if isinstance(content, dict) else set()


def of_root_key(key: str, word: str, made: Chosen) -> list[str]:
    """Return the overrides to type for a key that steps of a pipeline have but its root has not.

    Args:
        key: The unknown key, without the part after its first dot.
        word: The whole word as typed.
        made: The pipeline.
    """
    typed, _, value = word.lstrip("+~").partition("=")
    below = typed.removeprefix(key)
    named = [step for step, stage in made.stages.items() if stage == key and step in made.steps]
    found = [f"{step}{below}" for step in named if _has(made.config, f"{step}{below}")]
    owners = [step for step, config in made.steps.items() if key in config]
    found += [f"{step}.{typed}" for step in owners if _has(made.config, f"{step}.{typed}")]
    if owners and not found:
        step = below.removeprefix(".")
        if step in made.steps:
            return [f"stage@{step}={value}" if key == "stage" else f"{key}@{step}.{key}={value}"]
        paths = (path for step in made.steps for path in _paths(made.config[step], f"{step}."))
        found = get_close_matches(typed, paths, n=1, cutoff=_ALIKE)
    return [f"{path}={value or '...'}" for path in found]


def _has(config: DictConfig, path: str) -> bool:
    *above, last = path.split(".")
    node = OmegaConf.select(config, ".".join(above)) if above else config
    return isinstance(node, DictConfig) and last in node


def _paths(node: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys of all values below a node, except those of ``hydra``."""
    content = OmegaConf.to_container(node) if isinstance(node, DictConfig) else {}
    assert isinstance(content, dict)
    return [f"{prefix}{path}" for path, _ in leaves({key: inner for key, inner in content.items() if key != "hydra"})]


def groups_of(group: str, option: str, made: Chosen) -> Iterator[str]:
    """Yield the places of a group in a pipeline's steps that take an option; all its places if none does."""
    having = [step for step, config in made.steps.items() if isinstance(config.get(group), DictConfig)]
    taking = [step for step in having if group != "objective" or option in objectives(made.steps[step])]
    yield from (f"{step}.{group}" for step in taking or having)
