"""Collection of comparisons: K responses to each prompt from the newest policy, ranked by an annotator."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.utils.data import DataLoader

from rlhf.annotator.base import Annotator, completed
from rlhf.callbacks.reward_hacking import look, response_metrics
from rlhf.data.records import Comparison, Prompt, count_truncated
from rlhf.data.sources import TESTBED
from rlhf.data.split import Split
from rlhf.data.testbed.gold import gold
from rlhf.errors import UserError, key
from rlhf.models.language_model import LanguageModel
from rlhf.sampler.base import Sampler
from rlhf.sampler.rollout import Rollout
from rlhf.stage.base import Stage
from rlhf.stage.batch_order import Parts, derive_seed
from rlhf.storage.batch_file import BatchFile


class CollectStage(Stage):
    """Stage that writes ``comparisons.jsonl``: rankings of K responses with a grade for every pair.

    ``batch_size`` is in prompts; finished batches survive an interruption.
    """

    produces = "comparisons"
    reads: ClassVar[dict[str, tuple[str, ...]]] = {"data": ("prompt",)}
    progress_metrics = ()
    headline = "comparisons"
    defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 128}
    fixed = ("micro_batch_size", "gradient_clip")  # nothing is trained

    def __init__(
        self,
        model: LanguageModel,
        data: Split,
        sampler: Sampler,
        annotator: Annotator,
        **hyperparameters: Any,
    ) -> None:
        self.check_parts(sampler=sampler)
        super().__init__(model, None, None, **hyperparameters)
        self.data, self.sampler, self.annotator = data, sampler, annotator

    @classmethod
    def check_parts(cls, *, sampler: Sampler | None = None, **_: Any) -> None:
        """Validate the sampler: 2 or more samples per prompt, single turns.

        A batch is not split over ranks, so its size is free.
        """
        if sampler is None:
            return
        if sampler.samples < 2:
            raise UserError(
                "a comparison needs 2 or more responses",
                fix=f"type {key('sampler.samples', 4)}",
                option="sampler.samples",
                value=sampler.samples,
            )
        sampler.require_single_turn("comparisons are of single responses")

    def read_examples(self) -> None:
        """Read the training prompts; the held-out ones are not used."""
        self.examples = self.fit_prompts(self.data, self.sampler, held_out_sampled=0).train

    def prepare(self) -> None:
        """Move the annotator's weights to the device, and open the files that it keeps across runs."""
        self.annotator.to(self.device)
        self.annotator.open(self.run_directory.parent.parent / "judge")
        self.policy.eval()

    def predict_dataloader(self) -> DataLoader:
        """Return the prompts in their order. Lightning calls it before ``prepare``."""
        if not self.examples:
            self.read_examples()
        return DataLoader(self.examples, batch_size=self.batch_size, collate_fn=Parts)  # type: ignore[arg-type]

    def on_predict_epoch_start(self) -> None:
        """Find the batches that earlier attempts have finished, and this rank's share."""
        self.file = BatchFile(self.run_directory, "comparisons", self.trainer.global_rank, self.trainer.world_size)
        self.mine = set(self.file.mine(-(-len(self.examples) // self.batch_size)))

    @torch.no_grad()
    def predict_step(self, batch: Parts[Prompt], batch_idx: int) -> None:
        """Sample responses, rank them, and write the comparisons."""
        if batch_idx not in self.mine:
            return
        # The same on every rank; helpfulness and safety are not judged on the same responses.
        aspect = self.annotator.aspect
        seed = derive_seed(self.seed, "collect" if aspect == "total" else f"collect {aspect}", batch_idx, 0)
        rollout = self.sampler.sample(self.policy, list(batch), seed)
        found = self.annotator(rollout, self.sampler.samples, derive_seed(seed, "annotate"))
        comparisons = completed(rollout, found)
        self.file.add(
            batch_idx,
            comparisons=[comparison.to_json() for comparison in comparisons],
            prompts=len(batch),
            responses={name: value.item() for name, value in response_metrics(rollout).items()},
            annotator=dict(self.annotator.counts),
            agreement=agreement(rollout, comparisons, aspect) if self.data.data.source == TESTBED else {},
        )

    def on_predict_end(self) -> None:
        """Join the parts of all ranks, in the order of the prompts, into ``comparisons.jsonl``."""
        self.trainer.strategy.barrier()
        self.rows = list(self.file.read().values())
        self.trainer.strategy.barrier()  # every rank has read
        if self.trainer.is_global_zero:
            temporary = self.run_directory / ".comparisons.jsonl"
            with temporary.open("w", encoding="utf-8") as file:
                for row in self.rows:
                    file.writelines(json.dumps(comparison) + "\n" for comparison in row["comparisons"])
            temporary.rename(self.run_directory / "comparisons.jsonl")
            self.file.remove()

    def final_metrics(self) -> dict[str, float]:
        """Return counts of comparisons and pairs, shares of grades, response metrics and agreement with gold."""
        comparisons = [Comparison.from_json(raw) for row in self.rows for raw in row["comparisons"]]
        prompts = sum(row["prompts"] for row in self.rows)
        grades = Counter(grade for comparison in comparisons for grade in comparison.grades if grade is not None)
        total = max(1, sum(grades.values()))
        counts = sum((Counter(row["annotator"]) for row in self.rows), Counter[str]())
        agreed = sum((Counter(row["agreement"]) for row in self.rows), Counter[str]())
        names = set.intersection(*(set(row["responses"]) for row in self.rows))
        compared = max(1, sum(len(comparison.responses) for comparison in comparisons))
        weighted = {
            name: sum(row["responses"][name] * row["prompts"] for row in self.rows) / prompts for name in sorted(names)
        }
        look(self.trainer, self.name, weighted)
        return {
            "comparisons": len(comparisons),
            "prompts": prompts,
            "pairs": sum(len(comparison.pairs()) for comparison in comparisons),
            "cut_share": sum(map(count_truncated, comparisons)) / compared,
            **weighted,
            **{f"grade/{grade}": count / total for grade, count in sorted(grades.items())},
            **self.annotator.rates(counts),
            **{
                name.replace("of", "agreement", 1): agreed[name.replace("of", "right", 1)] / count
                for name, count in sorted(agreed.items())
                if name.startswith("of")
            },
        }


def agreement(rollout: Rollout, comparisons: list[Comparison], aspect: str = "total") -> dict[str, int]:
    """Count how often the annotator's order of a pair is gold's: pairs (`of`) and equal orders (`right`).

    Gold is its score of the same aspect. Ties, the annotator's and gold's, are left out. Pairs with a grade are also
    counted by grade.
    """
    prompts = {prompt.messages: prompt for prompt in rollout.prompts}
    counts: Counter[str] = Counter()
    for comparison in comparisons:
        truth = [getattr(gold(prompts[comparison.prompt], response), aspect) for response in comparison.responses]
        for better, worse, grade in comparison.pairs():
            if truth[better] == truth[worse]:
                continue
            for name in ("", *([f"/{grade}"] if grade else [])):
                counts[f"of{name}"] += 1
                counts[f"right{name}"] += truth[better] > truth[worse]
    return dict(counts)
