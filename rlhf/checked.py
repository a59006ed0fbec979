"""Step configs that passed validation, remembered so that typing a finished command again imports no torch.

Validation imports the classes that a config names, and they import torch: ten seconds to report that everything is
finished. What validation found out is therefore kept in the cache, under a digest of the whole config and of the code.
It is used only for runs that are finished; everything else is validated anew. No torch here.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlhf import runs
from rlhf.cache import recall, remember
from rlhf.config import Plain, targets


@dataclass(frozen=True)
class Facts:
    """What planning a step needs of the classes that its config names.

    Attributes:
        unread: groups that every step inherits and that its stage does not read.
        headline: the metric that a sweep optimises, "" if the stage names none.
        digests: keys of the nodes whose class has a ``digest`` of the data it reads.
    """

    unread: tuple[str, ...] = ()
    headline: str = ""
    digests: tuple[str, ...] = ()


def key(config: Plain, own: Mapping[str, Any], name: str) -> str:
    """Return the digest of a step's config as typed, of what the pipeline sets on it, and of the code."""
    packages = {"rlhf"} | {str(node["_target_"]).partition(".")[0] for _, node in targets(config)}
    code = {package: digest for package in sorted(packages) if (digest := runs.package_digest(package)) is not None}
    code |= runs.user_sources(config)
    text = json.dumps([config, dict(own), name, code], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def read(digest: str) -> Facts | None:
    """Return what was found out about a config that passed validation; None if it is not known."""
    try:
        content = json.loads(recall("checked", digest) or "")
        return Facts(tuple(content["unread"]), str(content["headline"]), tuple(content["digests"]))
    except (ValueError, KeyError, TypeError):
        return None


def write(digest: str, facts: Facts) -> None:
    """Remember a config that passed validation."""
    remember("checked", digest, json.dumps(asdict(facts)))
