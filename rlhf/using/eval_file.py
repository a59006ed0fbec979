"""Results of `rlhf eval`, as a table and as eval.json. This module imports no torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.runs import run_directory, run_files
from rlhf.storage import files

if TYPE_CHECKING:
    from rlhf.evaluation.best_of_n import BestOfN
    from rlhf.functional.statistics import Difference, Estimate

FILE = "eval.json"
# Metrics in the order of the table, and their names in it.
LABELS = {
    "gold": "gold reward",
    "gold_safe": "gold reward, safe prompts",
    "gold_unsafe": "gold reward, unsafe prompts",
    "reward": "reward model's score",
    "win_gold": "win rate by gold",
    "win_reward": "win rate by the reward model",
    "win_judge": "win rate by the judge",
    "kl": "KL to the reference (nats per response)",
    "length": "response length (tokens)",
    "ended": "share of responses that end",
    "perplexity_text": "perplexity of the text (per token)",
    "bits_per_byte_text": "bits per byte of the text",
    "perplexity_answers": "perplexity of the responses (per token)",
    "bits_per_byte_answers": "bits per byte of the responses",
}


@dataclass(frozen=True)
class Result:
    """Metrics of one policy, and their paired differences to the baseline on the same prompts."""

    name: str
    metrics: "dict[str, Estimate]"
    differences: "dict[str, Difference]"
    notes: list[str]
    samples: list[dict[str, Any]]
    best_of_n: "list[BestOfN]" = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers; null for values that are not finite, such as the standard error of a single value."""
        return {
            "metrics": {name: _finite(asdict(value)) for name, value in self.metrics.items()},
            "differences": {name: _finite(asdict(value)) for name, value in self.differences.items()},
            "notes": self.notes,
            "samples": self.samples,
            **({"best_of_n": [_finite(one.to_json()) for one in self.best_of_n]} if self.best_of_n else {}),
        }


def rows(results: Sequence[Result], differences: bool) -> list[tuple[str, ...]]:
    """Return a table's rows: the metric, and each policy's mean and standard error, or difference to the baseline."""
    found = []
    for name, label in LABELS.items():
        cells = [(result.differences if differences else result.metrics).get(name) for result in results]
        if any(cell is not None for cell in cells):
            found.append((label, *("-" if cell is None else _cell(cell) for cell in cells)))
    return found


def best_of_n_table(result: Result) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the columns and rows of the table of the best of n."""
    names = [name for name in LABELS if result.best_of_n and name in result.best_of_n[0].metrics]
    columns = ("n", *(LABELS[name] for name in names), "KL to the policy (nats)", "its bound")
    rows = [
        (str(one.n), *(_cell(one.metrics[name]) for name in names), _cell(one.kl), f"{one.kl_bound:.3f}")
        for one in result.best_of_n
    ]
    return columns, rows


def _cell(value: "Estimate | Difference") -> str:
    sign = "+" if hasattr(value, "surely") else ""
    mean, se = (
        f"{x:{plus}.1f}" if abs(value.mean) >= 1000 else f"{x:{plus}.3f}"
        for x, plus in ((value.mean, sign), (value.se, ""))
    )
    surely = f" ({value.surely()})" if hasattr(value, "surely") else ""
    return f"{mean} ± {se}{surely}"


def add(file: Path, settings: dict[str, Any], result: Result) -> None:
    """Add a result to a file of results; it replaces a result with the same settings."""
    settings = json.loads(json.dumps(settings))
    kept = [one for one in read(file) if one.get("settings") != settings]
    files.write_json(
        file, {"evaluations": [*kept, {"settings": settings, "when": run_directory.now(), **result.to_json()}]}
    )


def read(file: Path) -> list[dict[str, Any]]:
    """Return all results in a file, oldest first; empty if there is no file."""
    return list(run_files.read(file, run_files.EVALUATIONS)[0].get("evaluations", ()))


def _finite(values: Any) -> Any:
    """Return JSON values with null for numbers that are not finite."""
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    return None if isinstance(values, float) and not math.isfinite(values) else values
