"""Rewrite of overrides that only some jobs of a sweep accept, so that Hydra can compose the sweep.

Hydra composes the command line once without the swept values, and then rejects overrides that only a swept option
makes valid: ``adapter.rank=4`` with ``adapter=lora,qlora``, ``reward=gold`` with ``stage=grpo,rloo``.
"""

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf

from rlhf import discovery

WHOLE = ("stage", "pipeline", "experiment")  # their options add groups at the root


def deferred(words: list[str]) -> list[str]:
    """Return the command line of a sweep, with overrides that may depend on a swept option deferred to the jobs.

    ``adapter.rank=4`` becomes ``++adapter.rank=4``, which Hydra adds if the key is missing; each job then checks
    whether its option has the key. ``reward=gold`` becomes a sweep over one option, ``reward=choice(gold)``.
    """
    parser = OverridesParser.create()
    try:
        overrides = [None if word.startswith("-") else parser.parse_override(word) for word in words]
    except HydraException:
        return words  # Hydra reports the syntax error itself
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
    """Return the place of an override in the config; for a group, its package."""
    return override.package or override.key_or_group.replace("/", ".")


def _below(place: str, swept: list[str]) -> bool:
    return any(place == other or place.startswith(f"{other}.") for other in swept if other not in WHOLE)


def _always() -> set[str]:
    """Return the keys and groups that every config has."""
    root = OmegaConf.load(discovery.conf_dir() / "config.yaml")
    chosen = {str(key) for entry in root.defaults if OmegaConf.is_dict(entry) for key in entry}
    return chosen | {str(key) for key in root}
