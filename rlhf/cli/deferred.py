"""What a sweep leaves to its jobs.

Hydra composes the command line once without what is swept, and refuses there what only a swept option brings:
``adapter.rank=4`` beside ``adapter=lora,qlora``, ``reward=gold`` beside ``stage=grpo,rloo``.
"""

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf

from rlhf import discovery

WHOLE = ("stage", "pipeline", "experiment")  # their options bring groups at the root


def deferred(words: list[str]) -> list[str]:
    """The command line of a sweep, with what may depend on a swept option of a group marked as the jobs' own.

    ``adapter.rank=4`` becomes ``++adapter.rank=4``, which Hydra adds where it is not; whether an option takes it is
    checked in each job. ``reward=gold`` becomes a sweep over one option, ``reward=choice(gold)``.
    """
    parser = OverridesParser.create()
    try:
        overrides = [None if word.startswith("-") else parser.parse_override(word) for word in words]
    except HydraException:
        return words  # what is wrong with them Hydra says itself
    groups = discovery.group_names()
    swept = [_place(x) for x in overrides if x and x.is_sweep_override() and x.key_or_group.split("/")[0] in groups]
    if not swept:
        return words
    whole = any(place in WHOLE for place in swept)
    always = _always()
    found = []
    for word, x in zip(words, overrides, strict=True):
        place = _place(x) if x else ""
        depends = _below(place, swept) or (whole and place.partition(".")[0] not in always)
        if not x or not depends or x.type is not OverrideType.CHANGE or x.is_sweep_override():
            found.append(word)
        elif x.package is not None or x.key_or_group in groups:
            found.append("{}=choice({})".format(*word.split("=", 1)))
        else:
            found.append(f"++{word}")
    return found


def _place(override: Override) -> str:
    """Where in the config an override is: of a group its package."""
    return override.package or override.key_or_group.replace("/", ".")


def _below(place: str, swept: list[str]) -> bool:
    return any(place == other or place.startswith(f"{other}.") for other in swept if other not in WHOLE)


def _always() -> set[str]:
    """Keys and groups that every config has."""
    root = OmegaConf.load(discovery.conf_dir() / "config.yaml")
    chosen = {str(key) for entry in root.defaults if OmegaConf.is_dict(entry) for key in entry}
    return chosen | {str(key) for key in root}
