"""Keys of the root config, conf/config.yaml. This module imports no torch."""

from functools import cache

from omegaconf import DictConfig, OmegaConf

from rlhf import discovery


def root_keys() -> set[str]:
    """Return the keys that a config may have at its root: those of config.yaml, and the groups."""
    return {str(key) for key in root_config() if key != "defaults"} | discovery.group_names() | {"text", "steps"}


@cache
def root_config() -> DictConfig:
    """Return the content of the root's YAML file, read once."""
    root = OmegaConf.load(discovery.conf_dir() / "config.yaml")
    assert isinstance(root, DictConfig)
    return root
