"""Instantiation of config nodes, with the constructors' own errors instead of Hydra's wrappers."""

import dataclasses
import inspect
import logging
from typing import Any

import hydra.utils
from hydra.utils import get_object, instantiate

from rlhf.errors import first_line
from rlhf.importing import catch_exits


def load_target(name: Any) -> Any:
    """Return the class or function that a ``_target_`` names, or an explanation (str) why it cannot be loaded."""
    if not isinstance(name, str):
        return f"{name} is not the dotted path of a class or function"
    log = logging.getLogger(hydra.utils.__name__)  # Hydra logs the error itself
    silent, log.disabled = log.disabled, True
    try:
        with catch_exits():
            found = get_object(name)
        return found if callable(found) else f"{name} is not a class or function"
    except Exception as e:
        # Hydra wraps the original error, which is the one that a plugin author needs.
        root: BaseException = e
        while root.__cause__ is not None:
            root = root.__cause__
        return f"cannot import {name} ({type(root).__name__}: {first_line(root)})"
    finally:
        log.disabled = silent


def instantiate_cheap(node: dict[str, Any]) -> Any:
    """Build the object of a node if it only holds hyperparameters (a dataclass or a sampler); otherwise return None."""
    from rlhf.sampler.base import Sampler

    target = load_target(node["_target_"])
    cheap = dataclasses.is_dataclass(target) or inspect.isclass(target) and issubclass(target, Sampler)
    return instantiate(node) if cheap else None
