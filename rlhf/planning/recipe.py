"""Resolvers of the defaults that depend on the root's ``recipe``, and of the learning rate. No torch here.

``${recipe:PUBLISHED,TESTBED}`` is the first value with ``recipe=published`` (values published for models of 0.1B to 8B
weights) and the second one with ``recipe=testbed`` (values tuned on the testbed's model of 0.9M weights).
``${peak_lr:FULL,ADAPTER,TESTBED}`` is a stage's default of ``optimizer.lr``. A typed value replaces either.
"""

import re
from typing import Any

from omegaconf import DictConfig, OmegaConf

RECIPES = ("published", "testbed")
# The class of every other adapter trains few weights on a frozen base.
FULL = "rlhf.models.adapters.NoAdapter"
# Learning rate relative to AdamW's. Lion: 3 to 10 times smaller (Chen et al. 2023, section 5).
SCALES = {"rlhf.models.optimizers.lion_8bit": 0.2}


def register_recipe_resolvers() -> None:
    """Register the resolvers with OmegaConf. May be called any number of times."""
    OmegaConf.register_new_resolver("recipe", _recipe, replace=True)
    OmegaConf.register_new_resolver("peak_lr", _peak_lr, replace=True)


def values_by_recipe(value: Any) -> list[Any]:
    """Return the values that a raw value of a YAML file has with each recipe; a value of no recipe is the only one."""
    if not isinstance(value, str) or not re.fullmatch(r"\$\{recipe:[^{}]*\}", value):
        return [value]
    return [OmegaConf.create({"recipe": name, "value": value}).value for name in RECIPES]


def _recipe(published: Any, testbed: Any, *, _root_: DictConfig) -> Any:
    """Return the value of the chosen recipe; in a config without a root, such as a single option, the published one.

    `rlhf.planning.request` refuses other names before anything is resolved.
    """
    return testbed if _root_.get("recipe") == "testbed" else published


def _peak_lr(full: float, adapter: float, testbed: float, *, _root_: DictConfig, _parent_: DictConfig) -> float:
    """Return the peak learning rate of a stage.

    Args:
        full: AdamW's rate if all weights are trained.
        adapter: AdamW's rate for an adapter on a frozen base.
        testbed: AdamW's rate on the testbed, for both.
    """
    has_adapter = (_root_.get("adapter") or {}).get("_target_", FULL) != FULL
    rate = _recipe(adapter if has_adapter else full, testbed, _root_=_root_)
    scale = SCALES.get(str(_parent_.get("_target_")), 1.0)
    return float(rate) if scale == 1.0 else float(f"{rate * scale:.3g}")
