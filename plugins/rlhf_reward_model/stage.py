"""Reward model: a scalar head on a language model, trained so that better replies score higher."""

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rlhf.data.collate import PairBatch, collate_comparisons
from rlhf.data.data import Split
from rlhf.data.records import GRADES
from rlhf.data.template import EncodedComparison
from rlhf.errors import UserError
from rlhf.models.language_model import LanguageModel
from rlhf.models.scalar import ScalarModel
from rlhf.objective import Metrics, ScoreObjective
from rlhf.stage import Optimizer, Parts, Schedule, Stage
from rlhf.supervised import sum_of


class RewardModelStage(Stage):
    """All pairs of one prompt are in one batch element and weigh 1 / their number (InstructGPT, section 3.5).

    Args:
        batch_size: Prompts per update.
        micro_batch_size: Prompts per forward pass, null: all.
        gradient_clip: Largest gradient norm, null: none.
        epochs: Times each comparison is seen.
        head_init: Start of the scalar head: "normal" is N(0, 1/(D+1)), "zero" gives every reply 0.
        normalize: What is done to the scores once trained, over the replies of the training comparisons: "mean"
            makes their mean 0, "standard" also their standard deviation 1, "none" leaves them.
    """

    telling = ("loss", "accuracy", "val/accuracy")
    headline = "val/accuracy"

    def __init__(
        self,
        model: LanguageModel,
        objective: ScoreObjective,
        data: Split,
        optimizer: Optimizer,
        scheduler: Schedule,
        *,
        batch_size: Annotated[int, Field(gt=0)] = 32,
        micro_batch_size: Annotated[int, Field(gt=0)] | None = None,
        gradient_clip: Annotated[float, Field(gt=0)] | None = 1.0,
        epochs: Annotated[float, Field(gt=0)] = 1,
        head_init: Literal["normal", "zero"] = "normal",
        normalize: Literal["none", "mean", "standard"] = "standard",
    ) -> None:
        super().__init__(
            model,
            optimizer,
            scheduler,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            gradient_clip=gradient_clip,
        )
        self.objective, self.data, self.epochs, self.normalize = objective, data, epochs, normalize
        self.scorer = ScalarModel.load(model, zero_init=head_init == "zero").disable_dropout()
        self.policy = None  # type: ignore[assignment]  # the scorer owns the language model now

    def modules_trained(self) -> list[nn.Module]:
        """The decoder and the head."""
        return [self.scorer]

    def prepare(self) -> None:
        """Tokenises the comparisons."""
        self.encode(self.data, self.scorer.tokenizer)
        if self.objective.needs_grades and all(grade is None for x in self.examples for *_, grade in x.pairs):
            raise UserError("objective.margin reads grades, and no comparison here has one: type objective.margin=none")
        self.batches = self.order([len(example) for example in self.examples], epochs=self.epochs)

    def collate(self, examples: list[EncodedComparison]) -> PairBatch:
        """Every reply once, and the pairs among them."""
        return collate_comparisons(examples, self.scorer.pad_id)

    def losses(self, part: PairBatch) -> tuple[Tensor, Metrics, Tensor]:
        """The objective per pair [P], its metrics, and the scores per reply [R]."""
        tokens = part.tokens
        scores = self.scorer.scores(tokens.ids, tokens.attention_mask, tokens.position_ids)
        losses, metrics = self.objective(scores[part.chosen], scores[part.rejected], part.grade)
        return losses, metrics, scores

    def training_step(self, batch: Parts[PairBatch], batch_idx: int) -> None:
        """Mean over prompts of the mean over their pairs of -log sigmoid(r_chosen - r_rejected - margin)."""
        total = self.total(sum_of(part.weight.sum() for part in batch))
        for part in batch:
            losses, metrics, scores = self.losses(part)
            self.backward_mean(losses, part.weight, total, metrics)
            self.count(len(scores), part.tokens.attention_mask.sum())
        self.record(self.step())

    def validation_step(self, batch: Parts[PairBatch], batch_idx: int) -> None:
        """The same on held-out comparisons, accuracy by grade as well."""
        for part in batch:
            losses, metrics, _ = self.losses(part)
            for name, values in {"loss": losses, **metrics}.items():
                self.log_mean(f"val/{name}", values, part.weight)
            for code, grade in enumerate(GRADES):
                chosen = part.grade == code
                if chosen.any():
                    self.log_mean(f"val/accuracy/{grade}", metrics["accuracy"], chosen.float())

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Moves the scores of the training replies to mean 0 (and deviation 1): the loss knows differences only."""
        if self.normalize == "none":
            return
        scores = torch.cat(
            [
                self.losses(part.to(self.device))[2]
                for start in range(0, len(self.examples), self.batch_size)
                for part in self.parts(list(self.examples[start : start + self.batch_size]))
            ]
        )
        if self.normalize == "standard":
            self.scorer.calibrate(scores)
        else:
            self.scorer.bias.sub_(scores.mean())

    def save(self, folder: Path) -> None:
        """A sequence classifier with one output, and its normalisation."""
        self.scorer.save(folder)
