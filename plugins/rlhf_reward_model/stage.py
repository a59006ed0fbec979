"""Reward model: a scalar head on a language model, trained so that better responses score higher."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from rlhf.callbacks.progress import work_of
from rlhf.data.collate import PairBatch, collate, collate_comparisons
from rlhf.data.encoded_rows import Encoded, EncodedComparison
from rlhf.data.encoding import encode_prompt, encode_response
from rlhf.data.records import GRADES
from rlhf.data.split import Split
from rlhf.errors import UserError, key
from rlhf.functional.calibration import Reliability, histogram, reliability
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.language_model import LanguageModel
from rlhf.models.precision import Precision
from rlhf.models.scalar import ScalarModel
from rlhf.models.tokenizer_loading import Corpus
from rlhf.objective import Metrics, ScoreObjective, win_rate
from rlhf.stage import figures
from rlhf.stage.base import Stage
from rlhf.stage.batch_order import Parts
from rlhf.stage.supervised import sum_scalars
from rlhf.stage.update import Optimizer, Schedule
from rlhf_reward_model.accuracy import ALL, Accuracy, accuracies, clusters


class RewardModelStage(Stage):
    """Stage that trains a reward model on comparisons.

    All pairs of one prompt are in one batch element and weigh 1 / their number (InstructGPT, section 3.5). The model
    starts from a language model, or from an earlier reward model with its head and normalization.

    Args:
        hyperparameters: Those of ``Stage``: ``batch_size`` and ``micro_batch_size`` are in prompts.
        epochs: Passes over the comparisons.
        head_init: Initialization of the scalar head on a language model: "normal" is N(0, 1/(D+1)), "zero" scores every
            response 0.
        normalize: Normalization of the scores after training: "mean" and "standard" give the responses of the training
            comparisons mean 0, and "standard" also standard deviation 1; "demonstrations" gives the demonstrations mean
            0 (InstructGPT); "none" leaves the scores.
        safety_coefficient: Weight of the auxiliary loss that classifies unsafe responses (Llama 2, section 3.2.2), 0:
            no head. It reads the labels of single responses, never the tags of the prompt: a refusal does no harm.
    """

    reads: ClassVar[dict[str, tuple[str, ...]]] = {"data": ("comparison",), "demonstrations": ("demonstration",)}
    progress_metrics = ("loss", "accuracy", "val/accuracy")
    headline = "val/accuracy"
    shardable = True
    defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 32, "gradient_clip": 1.0}

    def __init__(
        self,
        model: LanguageModel | ScalarModel,
        objective: ScoreObjective,
        data: Split,
        optimizer: Optimizer,
        scheduler: Schedule,
        demonstrations: Split | None = None,
        *,
        epochs: Annotated[float, Field(gt=0)] = 1,
        head_init: Literal["normal", "zero"] = "normal",
        normalize: Literal["none", "mean", "standard", "demonstrations"] = "standard",
        safety_coefficient: Annotated[float, Field(ge=0)] = 0.0,
        **hyperparameters: Any,
    ) -> None:
        self.check_parts(normalize=normalize, demonstrations=demonstrations)
        if isinstance(model, LanguageModel):
            model = ScalarModel.load(model, zero_init=head_init == "zero")
        super().__init__(model.language_model, optimizer, scheduler, **hyperparameters)
        self.objective, self.data, self.demonstrations = objective, data, demonstrations
        self.epochs, self.normalize, self.safety_coefficient = epochs, normalize, safety_coefficient
        self.scorer = model.disable_dropout()
        self.policy = None  # type: ignore[assignment]  # the scorer now owns the language model
        if safety_coefficient:
            self.scorer.add_safety_head()
        else:
            self.scorer.safety_head = None  # an earlier head would no longer fit the hidden states
        self.scorer.log_odds = 1.0  # the loss reads unnormalized scores; normalization at the end changes the scale
        self.calibration: Reliability | None = None
        self.accuracies: dict[str, Accuracy] = {}

    @classmethod
    def check_parts(cls, *, normalize: str = "none", demonstrations: Any = None, **parts: Any) -> None:
        """Validate as ``Stage.check_parts``; require demonstrations if they are used for normalization."""
        super().check_parts(**parts)
        if normalize == "demonstrations" and demonstrations is None:
            raise UserError(
                "needs demonstrations",
                fix=f"type {key('+data@demonstrations', 'demonstrations')}",
                option="stage.normalize",
                value=normalize,
            )

    @classmethod
    def unread(cls, *, normalize: str = "none", **_: Any) -> tuple[str, ...]:
        """Return ("demonstrations",) unless their mean score is to be 0."""
        return () if normalize == "demonstrations" else ("demonstrations",)

    @staticmethod
    def load_model(spec: CausalLM, adapter: NoAdapter, precision: Precision, corpus: Corpus | None) -> object:
        """Load a language model, or an earlier reward model to continue from."""
        return ScalarModel.load(spec, adapter, precision) if spec.scalar else spec.load(adapter, precision, corpus)

    def modules_trained(self) -> list[nn.Module]:
        """Return the decoder with its heads."""
        return [self.scorer]

    def read_examples(self) -> None:
        """Tokenize the comparisons and build the batch sampler."""
        self.encode(self.data, self.scorer.tokenizer)
        if self.objective.needs_grades and all(grade is None for x in self.examples for *_, grade in x.pairs):
            raise UserError(
                "reads grades, and no comparison of the data has one",
                fix=f"type {key('objective.margin', 'none')}",
                option="objective.margin",
            )
        if self.safety_coefficient:
            self.check_safety_labels()
        if self.normalize == "demonstrations":
            self.demonstration_rows = self.encode_demonstrations()
        self.batches = self.order([len(example) for example in self.examples], epochs=self.epochs)

    def check_safety_labels(self) -> None:
        """Raise UserError unless responses of both kinds are labelled; report how many comparisons have no label."""
        marks = {mark for example in self.examples for mark in example.unsafe}
        source, coefficient = self.data.report.source, self.safety_coefficient
        if len(marks) < 2:
            found = "has a label" if not marks else f"that is labelled is {'harmless' if False in marks else 'harmful'}"
            raise UserError(
                f"needs harmful and harmless responses, and {'no' if not marks else 'every'} response of {source} "
                f"{found}",
                fix=f"type {key('stage.safety_coefficient', 0)}, or give the rows a field unsafe with true or false "
                "for each response, as a run of stage=collect with the gold annotator does",
                option="stage.safety_coefficient",
                value=f"{coefficient:g}",
            )
        without = sum(not example.unsafe for example in self.examples)
        if without:
            self.note(
                f"{without} of {len(self.examples)} comparisons have no safety labels; they train the ranking alone"
            )

    def collate(self, examples: list[EncodedComparison]) -> PairBatch:
        """Return a micro-batch: every response once, and the pairs among them."""
        return collate_comparisons(examples, self.scorer.pad_id)

    def losses(self, part: PairBatch) -> tuple[Tensor, Metrics, Tensor, Metrics]:
        """Compute the loss per pair [P], its metrics, the scores per response [R], and the safety head's metrics [P].

        The safety metrics are 0 for pairs without labels; ``labelled`` returns their weights.
        """
        hidden = self.scorer.last_hidden(part.tokens)
        scores = self.scorer.project(hidden)
        losses, metrics = self.objective(scores[part.chosen], scores[part.rejected], part.grade)
        safety_metrics: Metrics = {}
        if self.safety_coefficient:
            assert part.unsafe is not None
            logits, unsafe, known = self.scorer.unsafe_logits(hidden), part.unsafe == 1, part.unsafe >= 0
            safety = F.binary_cross_entropy_with_logits(logits, unsafe.float(), reduction="none") * known
            right = ((logits > 0) == unsafe).float() * known
            # Each pair contributes the mean over its two responses, so that a prompt weighs the same as in the ranking.
            both = [(values[part.chosen] + values[part.rejected]) / 2 for values in (safety, right)]
            losses = losses + self.safety_coefficient * both[0]
            safety_metrics = {"safety_loss": both[0].detach(), "safety_accuracy": both[1]}
            self.recalled = (logits.detach() > 0)[unsafe].float()
        return losses, metrics, scores, safety_metrics

    def labelled(self, part: PairBatch) -> Tensor:
        """Return the weights [P] of pairs whose responses have safety labels; 0 for other pairs."""
        if not self.safety_coefficient or part.unsafe is None:
            return torch.zeros_like(part.weight)
        return part.weight * (part.unsafe >= 0)[part.chosen]

    def training_step(self, batch: Parts[PairBatch], batch_idx: int) -> None:
        """Make one optimizer step on the mean over prompts of the mean over their pairs of the objective.

        The ranking loss is -log sigmoid(r_chosen - r_rejected - margin).
        """
        total = self.loss_denominator(sum_scalars(part.weight.sum() for part in batch))
        labelled = self.loss_denominator(sum_scalars(self.labelled(part).sum() for part in batch))
        for part in batch:
            losses, metrics, scores, safety = self.losses(part)
            self.backward_mean(losses, part.weight, total, metrics)
            self.gather_means(safety, self.labelled(part), labelled)
            self.count(len(scores), part.tokens.attention_mask.sum())
        self.record(self.step())

    def validation_step(self, batch: Parts[PairBatch], batch_idx: int) -> None:
        """Log loss and metrics on held-out comparisons, and accuracy by grade."""
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

    # -- after training -------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Normalize the scores, whose level the loss does not determine, and measure accuracy and calibration."""
        if self.normalize == "standard":
            self.scorer.calibrate(self.score_comparisons(self.examples)[0])
        elif self.normalize == "mean":
            self.scorer.bias.sub_(self.score_comparisons(self.examples)[0].mean())
        elif self.normalize == "demonstrations":
            self.scorer.bias.sub_(self.score_demonstrations().mean())
        if self.held_out:
            self.diagnose()

    def score_comparisons(self, examples: Sequence[EncodedComparison]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scores of all responses [R], and of the chosen and the rejected one of every pair [P]."""
        scores, chosen, rejected = [], [], []
        with work_of(self, "scoring", len(examples), "comparison") as meter:
            for start in range(0, len(examples), self.batch_size):
                several = list(examples[start : start + self.batch_size])
                for part in self.parts(several):
                    part = part.to(self.device)
                    scores.append(self.scorer.scores(part.tokens))
                    chosen.append(scores[-1][part.chosen])
                    rejected.append(scores[-1][part.rejected])
                meter.advance(len(several))
        return torch.cat(scores), torch.cat(chosen), torch.cat(rejected)

    def encode_demonstrations(self) -> list[Encoded]:
        """Return the last response of every demonstration that fits, after its prompt.

        Raises:
            UserError: None fits. Raised before the training, at whose end the scores are needed.
        """
        assert self.demonstrations is not None
        tokenizer, rows = self.scorer.tokenizer, []
        for demonstration in self.demonstrations.train:
            messages = demonstration.messages
            last = max(index for index, message in enumerate(messages) if message.role == "assistant")
            prompt = encode_prompt(tokenizer, messages[:last])
            ended = demonstration.ended or last + 1 < len(messages)
            response = encode_response(tokenizer, messages[last].content, ended)
            if len(prompt) + len(response) <= self.demonstrations.data.max_length:
                rows.append(Encoded(prompt + response, [False] * len(prompt) + [True] * len(response)))
        if not rows:
            raise UserError(
                f"no demonstration fits, and {key('stage.normalize', 'demonstrations')} needs their scores",
                fix=f"type a larger {key('demonstrations.max_length')}",
                option="demonstrations.max_length",
                value=self.demonstrations.data.max_length,
            )
        return rows

    def score_demonstrations(self) -> Tensor:
        """Return scores [N] of the demonstrations, read at the same position as those of comparisons."""
        scores, rows = [], self.demonstration_rows
        for start in range(0, len(rows), 4 * self.batch_size):
            batch = collate(rows[start : start + 4 * self.batch_size], self.scorer.pad_id).to(self.device)
            scores.append(self.scorer.scores(batch))
        return torch.cat(scores)

    def diagnose(self) -> None:
        """Write accuracy by grade, calibration curve and score histogram of the held-out comparisons to files."""
        _, chosen, rejected = self.score_comparisons(self.held_out)
        self.accuracies = accuracies(self.held_out, win_rate(chosen, rejected))
        # Probabilities are those of the loss: gaps in its units, not in normalized ones.
        self.calibration = reliability((chosen - rejected) * self.scorer.log_odds, clusters=clusters(self.held_out))
        counts = histogram(chosen, rejected)
        if self.trainer.is_global_zero:
            files = {
                "accuracy": {grade: asdict(found) for grade, found in self.accuracies.items()},
                "calibration": self.calibration.to_json(),
                "score_histogram": counts,
            }
            for name, content in files.items():
                (self.run_directory / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            figures.plot_calibration(self.calibration, self.run_directory / "calibration.png")
            figures.plot_scores(counts, self.run_directory / "score_histogram.png")

    def final_metrics(self) -> dict[str, float]:
        """Return calibration error and Brier score of sigmoid(r_chosen - r_rejected), and errors of accuracies.

        The errors are standard errors; all are measured on held-out pairs.
        """
        if self.calibration is None:
            return {}
        found = {
            "val/calibration_error": self.calibration.ece,
            "val/calibration_error_debiased": self.calibration.rmsce,
            "val/brier": self.calibration.brier,
        }
        for grade, accuracy in self.accuracies.items():
            if accuracy.standard_error is not None:
                found["val/accuracy_se" if grade == ALL else f"val/accuracy_se/{grade}"] = accuracy.standard_error
        return found

    def save(self, folder: Path) -> None:
        """Write a sequence classifier with one output, and its normalization."""
        self.scorer.save(folder)
