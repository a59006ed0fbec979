"""An option of ``conf/model`` as the name of its weights, such as smollm2_135m for a run or a hub id. No torch."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import rlhf.config  # noqa: F401  it registers the resolvers that these options use
from rlhf import discovery


def weights(name: str) -> str | None:
    """Hub id, folder or GGUF file of the option's weights; None for no option, or one with random weights.

    Which of a hub id and a package it is, `rlhf.hub.choose` decides, as for ``model=NAME``.
    """
    if "/" in name:
        return None
    for file in discovery.named("model"):
        if file.stem == name:
            return _path(file)
    return None


def with_weights() -> list[str]:
    """Names of the options that have weights; the network is not asked."""
    found = dict.fromkeys(file.stem for file in discovery.named("model") if _named(file))
    return sorted(found)


def _read(file: Path) -> DictConfig:
    content = OmegaConf.load(file)
    return content if isinstance(content, DictConfig) else OmegaConf.create()


def _named(file: Path) -> bool:
    raw = OmegaConf.to_container(_read(file)).get("path")  # type: ignore[union-attr]
    return isinstance(raw, str) and not raw.startswith("${optional_input:") and raw != "???"


def _path(file: Path) -> str | None:
    try:
        path = OmegaConf.select(_read(file), "path")
    except OmegaConfBaseException:
        return None
    return None if path is None else str(path)
