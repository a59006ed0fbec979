"""Options of ``conf/model`` as names of their weights, such as smollm2_135m in place of a run or hub id.

This module imports no torch.
"""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf import discovery
from rlhf.planning import step_config  # noqa: F401  it registers the resolvers that these options use


def weights(name: str) -> str | None:
    """Return the hub id, directory or GGUF file of an option's weights; None for no such option or for random weights.

    `rlhf.storage.hub.choose` decides between a hub id and a package, as it does for ``model=NAME``.
    """
    if "/" in name:
        return None
    for file in discovery.named("model"):
        if file.stem == name:
            return _path(file)
    return None


def with_weights() -> list[str]:
    """Return the sorted names of the options that have weights, without network access."""
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
