"""Collecting comparisons: K replies to each prompt from the newest policy, ranked by an annotator."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch.utils.data import DataLoader

from rlhf.annotators import Annotator
from rlhf.data.data import Split
from rlhf.data.records import Comparison, Prompt
from rlhf.data.sources import TESTBED
from rlhf.data.testbed.gold import gold
from rlhf.diagnostics import look, reply_metrics
from rlhf.errors import UserError
from rlhf.models.language_model import LanguageModel
from rlhf.rollout import Rollout, Sampler
from rlhf.stage import Parts, Stage
from rlhf.together import Config, built


class CollectStage(Stage):
    """Writes ``comparisons.jsonl``: rankings of K replies with a grade for every pair.

    Args:
        batch_size: Prompts answered at a time; finished batches survive an interruption.
    """

    produces = "comparisons"
    telling = ()
    headline = "comparisons"

    def __init__(
        self,
        model: LanguageModel,
        data: Split,
        rollout: Sampler,
        annotator: Annotator,
        *,
        batch_size: Annotated[int, Field(gt=0)] = 128,
    ) -> None:
        super().__init__(model, None, None, batch_size=batch_size)
        check_samples(rollout.samples)
        self.data, self.rollout, self.annotator = data, rollout, annotator

    @staticmethod
    def check_config(config: Config) -> None:
        """What can be told before anything is loaded."""
        check_samples(built(config, "rollout").samples)

    def prepare(self) -> None:
        """Moves the annotator's model, if it has one, to the device, and opens what it keeps from run to run."""
        parts: list[Any] = [self.annotator, getattr(self.annotator, "reward", None)]
        for part in parts:
            if hasattr(part, "to"):
                part.to(self.device)
        if hasattr(self.annotator, "open"):
            self.annotator.open(self.run_folder.parent.parent / "judge")
        self.policy.eval()

    def predict_dataloader(self) -> DataLoader:
        """The training prompts in their order; the held-out ones stay unseen."""
        return DataLoader(self.data.train, batch_size=self.batch_size, collate_fn=Parts)  # type: ignore[arg-type]

    @property
    def part_file(self) -> Path:
        """Finished batches of this process, one JSON line each."""
        return self.run_folder / f"comparisons.part{self.trainer.global_rank}.jsonl"

    def finished(self) -> dict[int, dict[str, Any]]:
        """Batches done so far, by index; a line cut short by a kill is done again."""
        done = {}
        for file in self.run_folder.glob("comparisons.part*.jsonl"):
            for line in file.read_text(encoding="utf-8").split("\n")[:-1]:
                row = json.loads(line)
                done[row["batch"]] = row
        return done

    def on_predict_epoch_start(self) -> None:
        """Drops a half-written last line, so that what follows starts on a new one."""
        self.done = self.finished()
        if self.part_file.exists():
            text = self.part_file.read_text(encoding="utf-8")
            self.part_file.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")

    @torch.no_grad()
    def predict_step(self, batch: Parts[Prompt], batch_idx: int) -> None:
        """Sample, rank, write down."""
        if batch_idx in self.done or batch_idx % self.trainer.world_size != self.trainer.global_rank:
            return
        seed = self.step_seed("collect", batch_idx)
        rollout = self.rollout.sample(self.policy, list(batch), seed)
        comparisons = self.annotator(rollout, self.rollout.samples, seed)
        row = {
            "batch": batch_idx,
            "comparisons": [comparison.to_json() for comparison in comparisons],
            "prompts": len(batch),
            "replies": {name: value.item() for name, value in reply_metrics(rollout).items()},
            "annotator": dict(getattr(self.annotator, "counts", {})),
            "agreement": agreement(rollout, comparisons) if self.data.data.source == TESTBED else {},
        }
        with self.part_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def on_predict_end(self) -> None:
        """Joins the parts, in the order of the prompts."""
        self.trainer.strategy.barrier()
        done = self.finished()
        self.rows = [done[index] for index in sorted(done)]
        if self.trainer.is_global_zero:
            temporary = self.run_folder / ".comparisons.jsonl"
            with temporary.open("w", encoding="utf-8") as file:
                for row in self.rows:
                    file.writelines(json.dumps(comparison) + "\n" for comparison in row["comparisons"])
            temporary.rename(self.run_folder / "comparisons.jsonl")
            for part in self.run_folder.glob("comparisons.part*.jsonl"):
                part.unlink()

    def final_metrics(self) -> dict[str, float]:
        """How many comparisons and pairs there are, and how they are graded."""
        comparisons = [Comparison.from_json(raw) for row in self.rows for raw in row["comparisons"]]
        prompts = sum(row["prompts"] for row in self.rows)
        grades = Counter(grade for comparison in comparisons for grade in comparison.grades if grade is not None)
        total = max(1, sum(grades.values()))
        counts = sum((Counter(row["annotator"]) for row in self.rows), Counter[str]())
        agreed = sum((Counter(row["agreement"]) for row in self.rows), Counter[str]())
        names = set.intersection(*(set(row["replies"]) for row in self.rows))
        weighted = {
            name: sum(row["replies"][name] * row["prompts"] for row in self.rows) / prompts for name in sorted(names)
        }
        look(self.trainer, self.name, weighted)
        return {
            "comparisons": len(comparisons),
            "prompts": prompts,
            "pairs": sum(len(comparison.pairs()) for comparison in comparisons),
            **weighted,
            **{f"grade/{grade}": count / total for grade, count in sorted(grades.items())},
            **(self.annotator.rates(counts) if hasattr(self.annotator, "rates") else {}),
            **{
                name.replace("of", "agreement", 1): agreed[name.replace("of", "right", 1)] / count
                for name, count in sorted(agreed.items())
                if name.startswith("of")
            },
        }


def check_samples(samples: int) -> None:
    """Refuses a single reply to a prompt."""
    if samples < 2:
        raise UserError(f"rollout.samples={samples}: a comparison needs 2 or more; type rollout.samples=4")


def agreement(rollout: Rollout, comparisons: list[Comparison]) -> dict[str, int]:
    """How often the annotator's order of a pair is gold's: counts of pairs (`of`) and of equal orders (`right`).

    Ties, the annotator's and gold's, are left out. With a grade they are also counted by grade.
    """
    prompts = {prompt.messages: prompt for prompt in rollout.prompts}
    counts: Counter[str] = Counter()
    for comparison in comparisons:
        totals = [gold(prompts[comparison.prompt], reply).total for reply in comparison.responses]
        for better, worse, grade in comparison.pairs():
            if totals[better] == totals[worse]:
                continue
            for name in ("", *([f"/{grade}"] if grade else [])):
                counts[f"of{name}"] += 1
                counts[f"right{name}"] += totals[better] > totals[worse]
    return dict(counts)
