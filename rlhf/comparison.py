"""What a pipeline shows of its comparison, kept beside the last run: shown again without loading a model. No torch."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf import runs
from rlhf.config import Plain

FILE = "comparison.json"


@dataclass(frozen=True)
class Comparison:
    """Two policies on the same held-out prompts.

    Attributes:
        prompts: how many they responded to.
        clusters: how many different things these ask.
        table: rows (metric, before, after, difference), ready for the screen.
        samples: (prompt, response before, response after).
        metrics: the numbers, as `rlhf.evaluation.Evaluation.metrics` names them.
    """

    prompts: int
    clusters: int
    table: list[tuple[str, str, str, str]]
    samples: list[tuple[str, str, str]]
    metrics: dict[str, float]


def data_digests(node: Plain) -> dict[str, str]:
    """Return the digests of the data that a comparison reads, by the keys of its nodes.

    Raises:
        UserError: Data is not there, or cannot be read.
    """
    return runs.data_digests({"compare": node}, {}, [f"compare.{name}" for name in ("data", "text") if node.get(name)])


def key(node: Plain, fingerprints: Mapping[str, str]) -> str:
    """Return the digest of all that a comparison is computed from: settings, data, runs by role, and the code."""
    content = [node, dict(fingerprints), data_digests(node), runs.package_digest("rlhf")]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def read(folder: Path, key: str) -> Comparison | None:
    """Return the comparison kept in a run directory; None if there is none under this key."""
    try:
        content: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if content.pop("key") != key:
            return None
        table = [(row[0], row[1], row[2], row[3]) for row in content["table"]]
        samples = [(row[0], row[1], row[2]) for row in content["samples"]]
        return Comparison(int(content["prompts"]), int(content["clusters"]), table, samples, dict(content["metrics"]))
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None


def write(folder: Path, key: str, comparison: Comparison) -> None:
    """Keep a comparison in a run directory, in place of an earlier one."""
    runs.write_json(folder / FILE, {"key": key, **asdict(comparison)})
