"""Collecting comparisons: K replies to each prompt from the newest policy, ranked by an annotator."""

import json
from collections import Counter
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch.utils.data import DataLoader

from rlhf.annotators import Annotator, completed
from rlhf.batch_file import BatchFile
from rlhf.data.data import Split, cut_responses
from rlhf.data.records import Comparison, Prompt
from rlhf.data.sources import TESTBED
from rlhf.data.testbed.gold import gold
from rlhf.diagnostics import look, reply_metrics
from rlhf.errors import UserError
from rlhf.models.language_model import LanguageModel
from rlhf.rollout import Rollout, Sampler
from rlhf.stage import Parts, Stage, seed_of


class CollectStage(Stage):
    """Writes ``comparisons.jsonl``: rankings of K replies with a grade for every pair.

    Args:
        batch_size: Prompts answered at a time; finished batches survive an interruption.
    """

    produces = "comparisons"
    reads: ClassVar[dict[str, tuple[str, ...]]] = {"data": ("prompt",)}
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
        self.check_parts(rollout=rollout)
        super().__init__(model, None, None, batch_size=batch_size)
        self.data, self.rollout, self.annotator = data, rollout, annotator

    @classmethod
    def check_parts(cls, *, rollout: Sampler | None = None, **_: Any) -> None:
        """As ``Stage.check_parts``; a batch is not shared out over processes, so it may be of any size."""
        if rollout is None:
            return
        if rollout.samples < 2:
            raise UserError(f"rollout.samples={rollout.samples}: a comparison needs 2 or more; type rollout.samples=4")
        rollout.require_single_turn("comparisons are of single replies")

    def read_examples(self) -> None:
        """The training prompts; the held-out ones stay unseen."""
        self.examples = self.fit_prompts(self.data, self.rollout, held_out_answered=0).train

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
        """The prompts in their order; asked for before ``prepare``."""
        if not self.examples:
            self.read_examples()
        return DataLoader(self.examples, batch_size=self.batch_size, collate_fn=Parts)  # type: ignore[arg-type]

    def on_predict_epoch_start(self) -> None:
        """Finds what an earlier attempt has finished."""
        self.file = BatchFile(self.run_folder, "comparisons", self.trainer.global_rank, self.trainer.world_size)
        self.mine = set(self.file.mine(-(-len(self.examples) // self.batch_size)))

    @torch.no_grad()
    def predict_step(self, batch: Parts[Prompt], batch_idx: int) -> None:
        """Sample, rank, write down."""
        if batch_idx not in self.mine:
            return
        # The same on every process; helpfulness and safety are not asked about the same replies.
        aspect = aspect_of(self.annotator)
        seed = seed_of(self.seed, "collect" if aspect == "total" else f"collect {aspect}", batch_idx, 0)
        rollout = self.rollout.sample(self.policy, list(batch), seed)
        found = self.annotator(rollout, self.rollout.samples, seed_of(seed, "annotate"))
        comparisons = completed(rollout, found)
        self.file.add(
            batch_idx,
            comparisons=[comparison.to_json() for comparison in comparisons],
            prompts=len(batch),
            replies={name: value.item() for name, value in reply_metrics(rollout).items()},
            annotator=dict(getattr(self.annotator, "counts", {})),
            agreement=agreement(rollout, comparisons, aspect) if self.data.data.source == TESTBED else {},
        )

    def on_predict_end(self) -> None:
        """Joins the parts, in the order of the prompts."""
        self.trainer.strategy.barrier()
        self.rows = list(self.file.read().values())
        self.trainer.strategy.barrier()  # all have read
        if self.trainer.is_global_zero:
            temporary = self.run_folder / ".comparisons.jsonl"
            with temporary.open("w", encoding="utf-8") as file:
                for row in self.rows:
                    file.writelines(json.dumps(comparison) + "\n" for comparison in row["comparisons"])
            temporary.rename(self.run_folder / "comparisons.jsonl")
            self.file.remove()

    def final_metrics(self) -> dict[str, float]:
        """How many comparisons and pairs there are, and how they are graded."""
        comparisons = [Comparison.from_json(raw) for row in self.rows for raw in row["comparisons"]]
        prompts = sum(row["prompts"] for row in self.rows)
        grades = Counter(grade for comparison in comparisons for grade in comparison.grades if grade is not None)
        total = max(1, sum(grades.values()))
        counts = sum((Counter(row["annotator"]) for row in self.rows), Counter[str]())
        agreed = sum((Counter(row["agreement"]) for row in self.rows), Counter[str]())
        names = set.intersection(*(set(row["replies"]) for row in self.rows))
        responses = max(1, sum(len(comparison.responses) for comparison in comparisons))
        weighted = {
            name: sum(row["replies"][name] * row["prompts"] for row in self.rows) / prompts for name in sorted(names)
        }
        look(self.trainer, self.name, weighted)
        return {
            "comparisons": len(comparisons),
            "prompts": prompts,
            "pairs": sum(len(comparison.pairs()) for comparison in comparisons),
            "cut_share": sum(map(cut_responses, comparisons)) / responses,
            **weighted,
            **{f"grade/{grade}": count / total for grade, count in sorted(grades.items())},
            **(self.annotator.rates(counts) if hasattr(self.annotator, "rates") else {}),
            **{
                name.replace("of", "agreement", 1): agreed[name.replace("of", "right", 1)] / count
                for name, count in sorted(agreed.items())
                if name.startswith("of")
            },
        }


def aspect_of(annotator: Any) -> str:
    """What an annotator judges: "total" unless it is asked for helpfulness or safety alone."""
    return getattr(annotator, "aspect", "total")


def agreement(rollout: Rollout, comparisons: list[Comparison], aspect: str = "total") -> dict[str, int]:
    """How often the annotator's order of a pair is gold's: counts of pairs (`of`) and of equal orders (`right`).

    Gold is its score of the same aspect.

    Ties, the annotator's and gold's, are left out. With a grade they are also counted by grade.
    """
    prompts = {prompt.messages: prompt for prompt in rollout.prompts}
    counts: Counter[str] = Counter()
    for comparison in comparisons:
        truth = [getattr(gold(prompts[comparison.prompt], reply), aspect) for reply in comparison.responses]
        for better, worse, grade in comparison.pairs():
            if truth[better] == truth[worse]:
                continue
            for name in ("", *([f"/{grade}"] if grade else [])):
                counts[f"of{name}"] += 1
                counts[f"right{name}"] += truth[better] > truth[worse]
    return dict(counts)
