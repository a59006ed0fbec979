"""A pipeline's final comparison, stored in its last run directory, so that it is shown again without loading a model.

This module imports no torch.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.runs import fingerprint, source_code
from rlhf.storage import files
from rlhf.storage.plain import Plain

FILE = "comparison.json"


@dataclass(frozen=True)
class Comparison:
    """Comparison of two policies on the same held-out prompts.

    Attributes:
        prompts: number of prompts that both policies responded to.
        clusters: number of clusters of prompts; prompts with the same question share a cluster.
        table: rows (metric, before, after, difference), formatted for the terminal.
        samples: (prompt, response before, response after).
        metrics: the numbers, under the names of `rlhf.evaluation.compare.Evaluation.metrics`.
    """

    prompts: int
    clusters: int
    table: list[tuple[str, str, str, str]]
    samples: list[tuple[str, str, str]]
    metrics: dict[str, float]


def data_digests(node: Plain) -> dict[str, str]:
    """Return the digests of the data that a comparison reads, keyed by the path of their config nodes.

    Raises:
        UserError: The data is missing or cannot be read.
    """
    return fingerprint.data_digests(
        {"compare": node}, {}, [f"compare.{name}" for name in ("data", "text") if node.get(name)]
    )


def key(node: Plain, fingerprints: Mapping[str, str]) -> str:
    """Return the SHA-256 of everything that a comparison depends on: settings, data, compared runs and code.

    Args:
        node: The pipeline's ``compare`` group, resolved.
        fingerprints: Role (before, after, reward_model) -> fingerprint of the run in that role.
    """
    content = [node, dict(fingerprints), data_digests(node), source_code.package_digest("rlhf")]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def read(folder: Path, key: str) -> Comparison | None:
    """Return the comparison stored in a run directory; None if it is missing, unreadable or has another key."""
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
    """Write a comparison into a run directory and replace any earlier one."""
    files.write_json(folder / FILE, {"key": key, **asdict(comparison)})
