"""Selection of responses, and the file of the selected ones."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf.data.records import Prompt
from rlhf.errors import UserError
from rlhf.functional.best_of_n import expected_best, fit_log_law, kl_bound
from rlhf.storage.files import write_text

Selection = Literal["best_per_prompt", "top_overall", "random_per_prompt", "random_overall"]


@dataclass
class Candidate:
    """Response that may be selected."""

    prompt: Prompt
    response: str
    ended: bool
    temperature: float | None  # None: selected in an earlier round
    score: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the candidate as plain JSON values, a line of selected_responses.jsonl."""
        return {
            **self.prompt.to_json(),
            "response": self.response,
            "ended": self.ended,
            "score": self.score,
            "temperature": self.temperature,
        }


def prompt_key(prompt: Prompt) -> str:
    """Return the identity of a prompt: the roles and contents of its messages."""
    return "\x1f".join(f"{message.role}:{message.content}" for message in prompt.messages)


def select_responses(candidates: Sequence[Candidate], select: Selection, count: int, seed: int) -> list[Candidate]:
    """Select responses and return them in the order of the prompts.

    Args:
        candidates: All responses, scored; those to one prompt need not be adjacent.
        select: The rule; the two with one response per prompt do not use ``count``.
        count: Number of responses to select.
        seed: Seed of the rules that draw at random, and of the choice among responses of equal score.
    """
    generator = torch.Generator().manual_seed(seed)
    places: dict[str, int] = {}
    for candidate in candidates:
        places.setdefault(prompt_key(candidate.prompt), len(places))
    if select.endswith("_per_prompt"):
        groups: list[list[Candidate]] = [[] for _ in places]
        for candidate in candidates:
            groups[places[prompt_key(candidate.prompt)]].append(candidate)
        if select == "best_per_prompt":
            shuffled = ([group[i] for i in torch.randperm(len(group), generator=generator)] for group in groups)
            return [max(group, key=lambda candidate: candidate.score) for group in shuffled]
        draws = torch.rand(len(groups), generator=generator).tolist()
        return [group[int(draw * len(group))] for draw, group in zip(draws, groups, strict=True)]
    # Equal responses to the same prompt count once; otherwise the easiest prompts would fill the list.
    distinct = list({(prompt_key(c.prompt), c.response, c.ended): c for c in reversed(candidates)}.values())[::-1]
    chosen = [distinct[row] for row in torch.randperm(len(distinct), generator=generator).tolist()]
    if select == "top_overall":
        chosen.sort(key=lambda candidate: -candidate.score)
    chosen = chosen[:count]
    return sorted(chosen, key=lambda candidate: places[prompt_key(candidate.prompt)])


def best_of_k_statistics(scores: Tensor, spread: list[float], selected: Sequence[Candidate]) -> dict[str, Any]:
    """Return the gains of the best of k responses and of the selected ones, the content of ``best_of_k.json``.

    Args:
        scores: Scores of the K responses to each of N prompts, [N, K].
        spread: The temperature of each of the K.
        selected: The selected responses.
    """
    best = expected_best(scores)
    gains = {k: value - best[1] for k, value in best.items()}
    slope, explained = fit_log_law(gains)
    winners = scores == scores.amax(dim=1, keepdim=True)
    won = (
        (winners / winners.sum(dim=1, keepdim=True)).mean(dim=0).tolist()
    )  # best responses of equal score share the win
    temperatures = {
        f"{value:g}": {
            "reward_mean": scores[:, [k for k, t in enumerate(spread) if t == value]].mean().item(),
            "share_of_best": sum(share for share, t in zip(won, spread, strict=True) if t == value),
        }
        for value in dict.fromkeys(spread)
    }
    return {
        "samples": scores.shape[1],
        "prompts": len(scores),
        "reward_mean": best[1],
        "reward_best": best[scores.shape[1]],
        "reward_selected": sum(candidate.score for candidate in selected) / len(selected),
        "earlier_share": sum(candidate.temperature is None for candidate in selected) / len(selected),
        "cut_share": sum(not candidate.ended for candidate in selected) / len(selected),
        "gain_by_k": {str(k): gain for k, gain in gains.items()},
        "kl_bound_by_k": {str(k): kl_bound(k) for k in gains},
        "gain_per_log_k": slope,
        "log_law_r2": explained,
        "temperatures": temperatures,
    }


def write_selected(path: Path, selected: Sequence[Candidate]) -> None:
    """Write the selected responses as JSON lines; the file is complete or absent."""
    write_text(path, "".join(json.dumps(candidate.to_json(), ensure_ascii=False) + "\n" for candidate in selected))


def read_selected(source: str) -> list[Candidate]:
    """Return the selected responses of a run, or of a file selected_responses.jsonl.

    Raises:
        UserError: There are none, or a line is invalid.
    """
    path = Path(source)
    path = path / "selected_responses.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            "has no selected_responses.jsonl",
            fix="type a run of stage=rejection_sampling",
            option="inputs.selected_responses",
            value=source,
        )
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            raw = json.loads(line)
            found.append(
                Candidate(Prompt.from_json(raw), raw["response"], bool(raw.get("ended", True)), raw.get("temperature"))
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"line {number} is not a selected response ({error!r})",
                fix="type a run of stage=rejection_sampling",
                option="inputs.selected_responses",
                value=source,
            ) from error
    return found
