"""Reward model: a scalar head on a language model, trained so that better replies score higher."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from rlhf.data.collate import PairBatch, collate, collate_comparisons
from rlhf.data.data import Split
from rlhf.data.records import GRADES
from rlhf.data.template import Encoded, EncodedComparison, encode_prompt, encode_response
from rlhf.errors import UserError
from rlhf.functional.calibration import Reliability, histogram, reliability
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM, Corpus
from rlhf.models.language_model import LanguageModel
from rlhf.models.precision import Precision
from rlhf.models.scalar import ScalarModel
from rlhf.objective import Metrics, ScoreObjective, win_rate
from rlhf.progress import work_of
from rlhf.report import diagnostics
from rlhf.stage import Optimizer, Parts, Schedule, Stage
from rlhf.supervised import sum_of
from rlhf_reward_model.accuracy import ALL, Accuracy, accuracies, clusters


class RewardModelStage(Stage):
    """All pairs of one prompt are in one batch element and weigh 1 / their number (InstructGPT, section 3.5).

    Starts from a language model, or from an earlier reward model with its head and normalisation.

    Args:
        batch_size: Prompts per update.
        micro_batch_size: Prompts per forward pass, null: all.
        gradient_clip: Largest gradient norm, null: none.
        epochs: Times each comparison is seen.
        head_init: Start of the scalar head on a language model: "normal" is N(0, 1/(D+1)), "zero" gives every reply 0.
        normalize: What is done to the scores once trained: "mean" and "standard" give the replies of the training
            comparisons mean 0, and "standard" also deviation 1; "demonstrations" gives the demonstrations mean 0
            (InstructGPT); "none" leaves them.
        safety_coefficient: Weight of the auxiliary loss that tells unsafe replies (Llama 2, section 3.2.2), 0: no head.
            It reads the labels of single replies, never the tags of the prompt: a refusal does no harm.
    """

    reads: ClassVar[dict[str, tuple[str, ...]]] = {"data": ("comparison",), "demonstrations": ("demonstration",)}
    telling = ("loss", "accuracy", "val/accuracy")
    headline = "val/accuracy"

    def __init__(
        self,
        model: LanguageModel | ScalarModel,
        objective: ScoreObjective,
        data: Split,
        optimizer: Optimizer,
        scheduler: Schedule,
        demonstrations: Split | None = None,
        *,
        batch_size: Annotated[int, Field(gt=0)] = 32,
        micro_batch_size: Annotated[int, Field(gt=0)] | None = None,
        gradient_clip: Annotated[float, Field(gt=0)] | None = 1.0,
        epochs: Annotated[float, Field(gt=0)] = 1,
        head_init: Literal["normal", "zero"] = "normal",
        normalize: Literal["none", "mean", "standard", "demonstrations"] = "standard",
        safety_coefficient: Annotated[float, Field(ge=0)] = 0.0,
    ) -> None:
        self.check_parts(normalize=normalize, demonstrations=demonstrations)
        if isinstance(model, LanguageModel):
            model = ScalarModel.load(model, zero_init=head_init == "zero")
        super().__init__(
            model.language_model,
            optimizer,
            scheduler,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            gradient_clip=gradient_clip,
        )
        self.objective, self.data, self.demonstrations = objective, data, demonstrations
        self.epochs, self.normalize, self.safety_coefficient = epochs, normalize, safety_coefficient
        self.scorer = model.disable_dropout()
        self.policy = None  # type: ignore[assignment]  # the scorer owns the language model now
        if safety_coefficient:
            self.scorer.add_safety_head()
        else:
            self.scorer.safety_head = None  # an earlier one would no longer fit the hidden states
        self.scorer.log_odds = 1.0  # the loss reads the scores as they are now; normalisation at the end changes them
        self.calibration: Reliability | None = None
        self.accuracies: dict[str, Accuracy] = {}

    @classmethod
    def check_parts(cls, *, normalize: str = "none", demonstrations: Any = None, **parts: Any) -> None:
        """As ``Stage.check_parts``."""
        super().check_parts(**parts)
        if normalize == "demonstrations" and demonstrations is None:
            raise UserError("stage.normalize=demonstrations needs them: type +data@demonstrations=demonstrations")

    @classmethod
    def unread(cls, *, normalize: str = "none", **_: Any) -> tuple[str, ...]:
        """The demonstrations, unless their scores are to be the zero."""
        return () if normalize == "demonstrations" else ("demonstrations",)

    @staticmethod
    def load_model(spec: CausalLM, adapter: NoAdapter, precision: Precision, corpus: Corpus | None) -> object:
        """A language model, or an earlier reward model to go on from."""
        return ScalarModel.load(spec, adapter, precision) if spec.scalar else spec.load(adapter, precision, corpus)

    def modules_trained(self) -> list[nn.Module]:
        """The decoder and its heads."""
        return [self.scorer]

    def read_examples(self) -> None:
        """Tokenises the comparisons."""
        self.encode(self.data, self.scorer.tokenizer)
        if self.objective.needs_grades and all(grade is None for x in self.examples for *_, grade in x.pairs):
            raise UserError("objective.margin reads grades, and no comparison here has one: type objective.margin=none")
        if self.safety_coefficient:
            self.check_safety_labels()
        self.batches = self.order([len(example) for example in self.examples], epochs=self.epochs)

    def check_safety_labels(self) -> None:
        """Raise UserError unless responses of both kinds are labelled; report how many comparisons have no label."""
        marks = {mark for example in self.examples for mark in example.unsafe}
        source, coefficient = self.data.report.source, self.safety_coefficient
        if len(marks) < 2:
            found = "has a label" if not marks else f"that is labelled is {'harmless' if False in marks else 'harmful'}"
            raise UserError(
                f"stage.safety_coefficient={coefficient:g} learns from harmful and harmless responses, and "
                f"{'no' if not marks else 'every'} response of {source} {found}: type stage.safety_coefficient=0, or "
                "give rows a field unsafe with true or false for each response (stage=collect annotator=gold does)"
            )
        without = sum(not example.unsafe for example in self.examples)
        if without:
            self.note(
                f"{without} of {len(self.examples)} comparisons have no safety labels; they train the ranking alone"
            )

    def collate(self, examples: list[EncodedComparison]) -> PairBatch:
        """Every reply once, and the pairs among them."""
        return collate_comparisons(examples, self.scorer.pad_id)

    def losses(self, part: PairBatch) -> tuple[Tensor, Metrics, Tensor, Metrics]:
        """Compute the loss per pair [P], its metrics, the scores per reply [R], and the safety head's metrics [P].

        The last are 0 for pairs without labels: ``labelled`` gives their weights.
        """
        tokens = part.tokens
        hidden = self.scorer.last_hidden(tokens.ids, tokens.attention_mask, tokens.position_ids)
        scores = self.scorer.project(hidden)
        losses, metrics = self.objective(scores[part.chosen], scores[part.rejected], part.grade)
        safety_metrics: Metrics = {}
        if self.safety_coefficient:
            assert part.unsafe is not None
            logits, unsafe, known = self.scorer.unsafe_logits(hidden), part.unsafe == 1, part.unsafe >= 0
            safety = F.binary_cross_entropy_with_logits(logits, unsafe.float(), reduction="none") * known
            right = ((logits > 0) == unsafe).float() * known
            # Each pair brings the mean over its two replies, so that a prompt weighs as much here as in the ranking.
            both = [(values[part.chosen] + values[part.rejected]) / 2 for values in (safety, right)]
            losses = losses + self.safety_coefficient * both[0]
            safety_metrics = {"safety_loss": both[0].detach(), "safety_accuracy": both[1]}
            self.recalled = (logits.detach() > 0)[unsafe].float()
        return losses, metrics, scores, safety_metrics

    def labelled(self, part: PairBatch) -> Tensor:
        """Return the weights of the pairs [P] whose replies carry safety labels; 0 for the others."""
        if not self.safety_coefficient or part.unsafe is None:
            return torch.zeros_like(part.weight)
        return part.weight * (part.unsafe >= 0)[part.chosen]

    def training_step(self, batch: Parts[PairBatch], batch_idx: int) -> None:
        """Mean over prompts of the mean over their pairs of -log sigmoid(r_chosen - r_rejected - margin)."""
        total = self.total(sum_of(part.weight.sum() for part in batch))
        labelled = self.total(sum_of(self.labelled(part).sum() for part in batch))
        for part in batch:
            losses, metrics, scores, safety = self.losses(part)
            self.backward_mean(losses, part.weight, total, metrics)
            self.gather_means(safety, self.labelled(part), labelled)
            self.count(len(scores), part.tokens.attention_mask.sum())
        self.record(self.step())

    def validation_step(self, batch: Parts[PairBatch], batch_idx: int) -> None:
        """The same on held-out comparisons, accuracy by grade as well."""
        for part in batch:
            losses, metrics, _, safety = self.losses(part)
            for name, values in {"loss": losses, **metrics}.items():
                self.log_mean(f"val/{name}", values, part.weight)
            for name, values in safety.items():
                self.log_mean(f"val/{name}", values, self.labelled(part))
            for code, grade in enumerate(GRADES):
                chosen = part.grade == code
                if chosen.any():
                    self.log_mean(f"val/accuracy/{grade}", metrics["accuracy"], chosen.float())
            if self.safety_coefficient and len(self.recalled):
                self.log_mean("val/safety_recall", self.recalled, torch.ones_like(self.recalled))

    # -- once trained ---------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Normalises the scores, whose level the loss does not know, and says how far they can be believed."""
        if self.normalize == "standard":
            self.scorer.calibrate(self.scores_of(self.examples)[0])
        elif self.normalize == "mean":
            self.scorer.bias.sub_(self.scores_of(self.examples)[0].mean())
        elif self.normalize == "demonstrations":
            self.scorer.bias.sub_(self.scores_of_demonstrations().mean())
        if self.held_out:
            self.diagnose()

    def scores_of(self, examples: Sequence[EncodedComparison]) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of all replies [R], and of the chosen and the rejected one of every pair [P]."""
        scores, chosen, rejected = [], [], []
        with work_of(self, "scoring", len(examples), "comparison") as meter:
            for start in range(0, len(examples), self.batch_size):
                several = list(examples[start : start + self.batch_size])
                for part in self.parts(several):
                    part = part.to(self.device)
                    tokens = part.tokens
                    scores.append(self.scorer.scores(tokens.ids, tokens.attention_mask, tokens.position_ids))
                    chosen.append(scores[-1][part.chosen])
                    rejected.append(scores[-1][part.rejected])
                meter.advance(len(several))
        return torch.cat(scores), torch.cat(chosen), torch.cat(rejected)

    def scores_of_demonstrations(self) -> Tensor:
        """Scores of the last reply of every demonstration that fits, [N], read where those of comparisons are."""
        assert self.demonstrations is not None
        tokenizer, rows = self.scorer.tokenizer, []
        for demonstration in self.demonstrations.train:
            messages = demonstration.messages
            last = max(index for index, message in enumerate(messages) if message.role == "assistant")
            prompt = encode_prompt(tokenizer, messages[:last])
            ended = demonstration.ended or last + 1 < len(messages)
            reply = encode_response(tokenizer, messages[last].content, ended)
            if len(prompt) + len(reply) <= self.demonstrations.data.max_length:
                rows.append(Encoded(prompt + reply, [False] * len(prompt) + [True] * len(reply)))
        if not rows:
            raise UserError("stage.normalize=demonstrations: none fits demonstrations.max_length; type a larger one")
        scores = []
        for start in range(0, len(rows), 4 * self.batch_size):
            batch = collate(rows[start : start + 4 * self.batch_size], self.scorer.pad_id).to(self.device)
            scores.append(self.scorer.scores(batch.ids, batch.attention_mask, batch.position_ids))
        return torch.cat(scores)

    def diagnose(self) -> None:
        """Accuracy by grade, calibration curve and histogram of scores of the held-out comparisons, as files."""
        _, chosen, rejected = self.scores_of(self.held_out)
        self.accuracies = accuracies(self.held_out, win_rate(chosen, rejected))
        # Probabilities are those of the loss: gaps in its units, not in the normalised ones.
        self.calibration = reliability((chosen - rejected) * self.scorer.log_odds, clusters=clusters(self.held_out))
        counts = histogram(chosen, rejected)
        if self.trainer.is_global_zero:
            files = {
                "accuracy": {grade: asdict(found) for grade, found in self.accuracies.items()},
                "calibration": self.calibration.to_json(),
                "score_histogram": counts,
            }
            for name, content in files.items():
                (self.run_folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            diagnostics.calibration(self.calibration, self.run_folder / "calibration.png")
            diagnostics.scores(counts, self.run_folder / "score_histogram.png")

    def final_metrics(self) -> dict[str, float]:
        """How sure the accuracies are, and how well sigmoid(r_chosen - r_rejected) is calibrated, on held-out pairs."""
        if self.calibration is None:
            return {}
        found = {"val/calibration_error": self.calibration.ece, "val/brier": self.calibration.brier}
        for grade, accuracy in self.accuracies.items():
            if accuracy.standard_error is not None:
                found["val/accuracy_se" if grade == ALL else f"val/accuracy_se/{grade}"] = accuracy.standard_error
        return found

    def save(self, folder: Path) -> None:
        """A sequence classifier with one output, and its normalisation."""
        self.scorer.save(folder)
