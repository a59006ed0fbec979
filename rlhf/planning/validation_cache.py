"""Cache of step configs that passed validation, so that a finished command typed again imports no torch.

Validation imports the classes that a config names, and those import torch, which takes about ten seconds. The results
of validation are therefore cached under a digest of the whole config and of the code. They are used only for finished
runs; every other step is validated again. This module imports no torch.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlhf.runs import fingerprint, source_code
from rlhf.storage.cache import recall, remember
from rlhf.storage.plain import Plain, targets


@dataclass(frozen=True)
class StepProperties:
    """Properties of the classes named in a step's config that planning the step needs.

    Attributes:
        unread: shared groups that every step inherits and that this step's stage does not read.
        headline: the metric that a sweep optimises, "" if the stage names none.
        digests: keys of the nodes whose class has a ``digest`` of the data it reads.
    """

    unread: tuple[str, ...] = ()
    headline: str = ""
    digests: tuple[str, ...] = ()


def key(config: Plain, own: Mapping[str, Any], name: str) -> str:
    """Return the cache key of a step: the SHA-256 of its raw config, the pipeline's settings for it, and the code.

    Args:
        config: Raw config of the step, as typed.
        own: Values that the pipeline sets on the step itself.
        name: Name of the step, "" for a single run.
    """
    packages = {"rlhf"} | {str(node["_target_"]).partition(".")[0] for _, node in targets(config)}
    code = {
        package: digest for package in sorted(packages) if (digest := source_code.package_digest(package)) is not None
    }
    code |= fingerprint.user_sources(config)
    text = json.dumps([config, dict(own), name, code], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def read(digest: str) -> StepProperties | None:
    """Return the cached properties of a config that passed validation; None if the cache has no readable entry."""
    try:
        content = json.loads(recall("validation", digest) or "")
        return StepProperties(tuple(content["unread"]), str(content["headline"]), tuple(content["digests"]))
    except (ValueError, KeyError, TypeError):
        return None


def write(digest: str, properties: StepProperties) -> None:
    """Cache the properties of a config that passed validation."""
    remember("validation", digest, json.dumps(asdict(properties)))
