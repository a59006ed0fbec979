"""What reinforcement learning stages share: rollouts, scores, the gamma term, checks and diagnostics.

A stage on top of ``RolloutStage`` says how advantages come from scores and what loss they go into; everything that
must be the same in PPO, GRPO and RLOO for a comparison to mean something is here.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, Self, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from rlhf.data.collate import TokenBatch, collate, packed
from rlhf.data.data import Split
from rlhf.data.disk import keep
from rlhf.data.records import Prompt
from rlhf.data.template import encode_text
from rlhf.diagnostics import count_clusters, knows_gold, proxy_gold_gap, proxy_gold_gap_error, reply_metrics
from rlhf.errors import RunFailed, UserError
from rlhf.functional.advantages import sequence_kl
from rlhf.functional.kl import k3
from rlhf.functional.masking import masked_mean
from rlhf.functional.scores import Moments, ScoreScale, missing_end
from rlhf.models.average import MovingAverage
from rlhf.models.language_model import LanguageModel
from rlhf.models.roles import reference_of
from rlhf.objective import Metrics
from rlhf.rollout import Rollout, Sampler, joined, side_by_side, single
from rlhf.scoring import (
    MISSING_END_PENALTY,
    MissingEndOption,
    Reward,
    make_ready,
    model_rewards,
    resolve_missing_end,
)
from rlhf.stage import Optimizer, Parts, Schedule, Stage, check_context, chunks
from rlhf.vocabulary import check_vocabulary

#: In 16 bits single log-probabilities may be off by tenths; their mean gap may be this many times the tolerance.
COARSE = 50
#: Prompts of each part of the data on which the start is measured: an error of about 0.03 deviations of the gap.
START = 512


class SampledObjective(Protocol):
    """What every objective over sampled replies has."""

    @property
    def beta(self) -> float:
        """KL coefficient, at the start where it adapts."""

    @property
    def gamma(self) -> float:
        """Weight of the pretraining loss in the same optimizer step; 0 reads no text."""


class RowsOfTensors(Protocol):
    """Experience: rows that can be counted and picked."""

    @property
    def mask(self) -> Tensor: ...

    @property
    def logp(self) -> Tensor: ...

    @property
    def ref_logp(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor | slice) -> Self: ...


E = TypeVar("E", bound=RowsOfTensors)


class RolloutStage(Stage):
    """Base class of the stages that sample from the policy, score the replies, and update on them.

    A stage on top of it names the knobs that it adds, or has another default for, and takes the rest as ``**knobs``.

    Args:
        steps: Rollouts, each of ``batch_size`` prompts.
        batch_size: Prompts per rollout.
        epochs: Passes over each rollout.
        minibatches: Updates per pass.
        micro_batch_size: Rows per forward pass, null: a whole minibatch.
        gradient_clip: Largest gradient norm, null: none.
        text_ratio: Rows of pretraining text per reply in the gamma term.
        text_length: Tokens in a row of pretraining text.
        missing_end_penalty: Missing-EOS penalty, in units of the score by then.
        score_clip: Scores are clipped to plus or minus this, null: not.
        tolerance: Largest difference between the sampler's log-probabilities and recomputed ones in fp32.
        reference: Model that KL is measured against, null: the policy as it starts.
        normalize_scores: "none"; "batch": mean 0 and deviation 1 over each rollout; "running": over all so far.
        missing_end: What is done to the score of a response without EOS: "replace" makes it minus the penalty,
            "subtract" takes the penalty off, "none" leaves it; "auto" replaces under a trained reward model and leaves
            the scores of rules (``resolve_missing_end``).
        kl_budget: Nats per reply from the reference; a rollout beyond it ends the training. Null: no budget.
        average: Decay per update of a moving average of the weights, which is then what is validated and saved. Null:
            none.
    """

    reads: ClassVar[dict[str, tuple[str, ...]]] = {"data": ("prompt",), "text": ("text",)}
    telling = ("score", "kl", "length", "loss")
    headline = "val/score"
    models_beside = {"reference": False}

    def __init__(
        self,
        model: LanguageModel,
        objective: SampledObjective,
        data: Split,
        text: Split | None,
        reward: Reward,
        rollout: Sampler,
        optimizer: Optimizer,
        scheduler: Schedule,
        *,
        steps: Annotated[int, Field(gt=0)],
        batch_size: Annotated[int, Field(gt=0)],
        epochs: Annotated[int, Field(gt=0)],
        minibatches: Annotated[int, Field(gt=0)],
        score_clip: Annotated[float, Field(gt=0)] | None,
        micro_batch_size: Annotated[int, Field(gt=0)] | None = None,
        gradient_clip: Annotated[float, Field(gt=0)] | None = 1.0,
        text_ratio: Annotated[float, Field(gt=0)] = 1.0,
        text_length: Annotated[int, Field(gt=1)] = 64,
        tolerance: Annotated[float, Field(gt=0)] = 1e-3,
        reference: str | None = None,
        normalize_scores: ScoreScale = "none",
        missing_end: MissingEndOption = "auto",
        missing_end_penalty: Annotated[float, Field(ge=0)] = MISSING_END_PENALTY,
        kl_budget: Annotated[float, Field(gt=0)] | None = None,
        average: Annotated[float, Field(ge=0, lt=1)] | None = None,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            scheduler,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            gradient_clip=gradient_clip,
        )
        self.check_parts(
            objective=objective, text=text, rollout=rollout, batch_size=batch_size, minibatches=minibatches
        )
        check_context(model, text_length, "stage.text_length")
        self.objective: Any = objective
        self.data, self.text, self.reward, self.rollout = data, text, reward, rollout
        self.steps, self.epochs, self.minibatches = steps, epochs, minibatches
        self.text_ratio, self.text_length = text_ratio, text_length
        self.missing_end_penalty, self.score_clip, self.tolerance = missing_end_penalty, score_clip, tolerance
        self.normalize_scores = normalize_scores
        self.missing_end = resolve_missing_end(missing_end, missing_end_penalty, reward)
        self.kl_budget, self.average_decay = kl_budget, average
        self.policy.disable_dropout()
        self.reference = reference_of(model, reference)
        self.beta = objective.beta
        self.score_moments: tuple[float, float, float] = (0.0, 0.0, 0.0)
        self.start: dict[str, dict[str, float]] = {}  # scores before training, by part of the data
        self.over_budget = False
        self.average: MovingAverage | None = None
        self._average_state: dict[str, Tensor] | None = None
        self.answers: list[tuple[Rollout, Tensor, Tensor]] = []  # to held-out prompts, until they are described

    @classmethod
    def check_parts(
        cls,
        *,
        batch_size: int = 1,
        minibatches: int = 1,
        processes: int = 1,
        objective: Any = None,
        text: Any = None,
        model: Any = None,
        reference: str | None = None,
        **parts: Any,
    ) -> None:
        """As ``Stage.check_parts``."""
        super().check_parts(batch_size=batch_size, processes=processes, **parts)
        check_vocabulary(model, reference, "inputs.reference", "inputs.reference=null (the policy as it starts)")
        if batch_size % minibatches:
            raise UserError(
                f"stage.batch_size={batch_size} is not a multiple of stage.minibatches={minibatches}: "
                f"type stage.batch_size={-(-batch_size // minibatches) * minibatches}"
            )
        if batch_size // processes % minibatches:
            raise UserError(
                f"stage.minibatches={minibatches} does not divide the {batch_size // processes} prompts of each of the "
                f"{processes} processes: type a stage.batch_size that is a multiple of {minibatches * processes}"
            )
        if objective is not None and objective.gamma and text is None:
            raise UserError(
                f"objective.gamma={objective.gamma:g} needs pretraining text: type data@text=text, or objective.gamma=0"
            )

    @classmethod
    def unread(cls, *, objective: Any = None, **_: Any) -> tuple[str, ...]:
        """The text, where no pretraining term asks for it."""
        return () if objective is None or objective.gamma else ("text",)

    # -- set-up ---------------------------------------------------------------------------------------------------

    def roles(self) -> dict[str, Any]:
        """The reference and the reward models too."""
        rewards = {name: reward.model for name, reward in model_rewards(self.reward).items()}
        return {"policy": self.policy, "reference": self.reference} | rewards

    def read_examples(self) -> None:
        """The prompts, all of which fit the context with a reply."""
        processes = self.trainer.world_size  # which the config need not have said
        self.check_parts(batch_size=self.batch_size, minibatches=self.minibatches, processes=processes)
        fitted = self.fit_prompts(self.data, self.rollout)
        self.examples, self.held_out = fitted.train, fitted.validation
        self.batches = self.order(len(self.examples), steps=self.steps)

    def prepare(self) -> None:
        """Prompts, the stream of pretraining text, and the frozen models on the device."""
        self.read_examples()
        self.reference.to(self.device)
        make_ready(self.reward, self.device, [*self.examples, *self.held_out], self.rollout.room(self.policy))
        if self.average_decay is not None:
            self.average = MovingAverage(self.policy, self.average_decay)
            if self._average_state is not None:
                self.average.load(self._average_state)
        if self.objective.gamma:
            assert self.text is not None  # check_parts
            tokenizer = self.policy.tokenizer
            documents = (encode_text(tokenizer, record.text) for record in self.text.train)
            self.documents = keep(packed(documents, self.text_length), like=self.text.train)

    @torch.no_grad()
    def measure_start(self) -> None:
        """Score the policy before it is trained, where gold is known: what `proxy_gold_gap` is measured from.

        Each part of the data has a start of its own, of up to `START` of its prompts: the first rollout alone would be
        too noisy, and prompts that the policy was fine-tuned on are others than held-out ones. A resumed run has it in
        its checkpoint.
        """
        validated = self.held_out if self.trainer.limit_val_batches else []
        for part, prompts in (("train", self.examples), ("validation", validated)):
            prompts = prompts[:START]
            mine = prompts[self.trainer.global_rank :: self.trainer.world_size]
            if part in self.start or len(prompts) < 2 * self.trainer.world_size or not knows_gold(prompts[0]):
                continue
            sampler, size = single(self.rollout), self.batch_size // self.trainer.world_size
            rollouts = [
                sampler.sample(self.policy, list(mine[rows]), self.step_seed(f"start {part}", rows.start))
                for rows in chunks(len(mine), size)
            ]
            whole = joined(rollouts, self.policy.pad_id)
            found = reply_metrics(whole, self.reward(whole).float(), together=True)
            names = ("score", "score_std", "gold", "gold_std", "gold_correlation")
            self.start[part] = {name: found[name].item() for name in names}
            self.start[part]["clusters"] = count_clusters(whole.prompts)

    def parts(self, examples: list[Prompt]) -> Parts[Prompt]:
        """Prompts stay records, which the sampler tokenises; micro-batches are cut from the minibatches."""
        return Parts(examples)

    @property
    def total_updates(self) -> int:
        """Minibatches of all rollouts."""
        return self.steps * self.epochs * self.minibatches

    def schedule_position(self) -> tuple[int, int]:
        """The learning rate stays the same for all updates on a rollout."""
        return self.batches_done, self.steps

    # -- what a checkpoint holds ------------------------------------------------------------------------------------

    def counters(self) -> dict[str, Any]:
        """The adapted beta, the running moments and the start of the diagnostics too."""
        names = ("beta", "score_moments", "start")
        return super().counters() | {name: getattr(self, name) for name in names}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The moving average too."""
        super().on_save_checkpoint(checkpoint)
        if self.average is not None:
            checkpoint["average"] = self.average.state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Taken up again in ``prepare``, once the weights are on their device."""
        super().on_load_checkpoint(checkpoint)
        self._average_state = checkpoint.get("average")

    # -- scores and updates -----------------------------------------------------------------------------------------

    def scores(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """What the reward says of each reply of a training rollout, and the score that is learnt from, [B] each."""
        if self.updates_done == 0:
            self.measure_start()
        raw = self.reward(rollout).float()
        if self.normalize_scores != "none":
            before = Moments(*self.score_moments) if self.normalize_scores == "running" else Moments()
            now = before.updated(raw, self.sum_over_processes)
            self.score_moments = (now.count, now.mean, now.squares)
        return raw, self.learnt(raw, rollout.ended)

    def learnt(self, raw: Tensor, ended: Tensor) -> Tensor:
        """Scores normalised, clipped, and worse for replies that did not end, [B]."""
        scores = raw if self.normalize_scores == "none" else Moments(*self.score_moments).normalize(raw)
        if self.score_clip is not None:
            scores = scores.clamp(-self.score_clip, self.score_clip)
        return missing_end(scores, ended, self.missing_end_penalty, self.missing_end)

    def mean_over_processes(self, values: Tensor) -> float:
        """Mean of the values [B] of all processes."""
        total, count = self.sum_over_processes(torch.stack([values.sum(), values.new_tensor(len(values))])).tolist()
        return total / count

    def updates(self, experience: E, kl: float) -> list[Metrics]:
        """Every update on a rollout that is ``kl`` nats per reply from the reference; none beyond the budget."""
        if self.kl_budget is not None and not kl <= self.kl_budget:
            self.stop(kl)
            return []
        return [self.update(minibatch, first) for first, minibatch in self.order_of_updates(experience)]

    def update(self, minibatch: Any, first: bool) -> Metrics:
        """One optimizer step."""
        raise NotImplementedError

    def kl(self, experience: RowsOfTensors) -> float:
        """Nats per reply from the reference, mean over the replies of all processes."""
        return self.mean_over_processes(sequence_kl(experience.logp, experience.ref_logp, experience.mask))

    def stop(self, kl: float) -> None:
        """Ends the training before this rollout is learnt from: what is saved is the policy that sampled it."""
        self.over_budget = True
        self.trainer.should_stop = True
        self.note(
            f"rollout {self.batches_done + 1} of {self.steps} is {kl:.1f} nats per reply from the reference, more than "
            f"stage.kl_budget={self.kl_budget}: training ends here, the policy is saved"
        )

    def step(self, frozen: nn.Module | None = None) -> Metrics:
        """One optimizer step, and one of the moving average, unless the first was skipped."""
        metrics = super().step(frozen)
        if self.average is not None and not metrics.get("skipped_steps"):
            self.average.update()
        return metrics

    def order_of_updates(self, experience: E) -> Iterator[tuple[bool, E]]:
        """Minibatches, every epoch in an order of its own; the flag marks the first, where the ratio must be 1."""
        for epoch in range(self.epochs):
            generator = torch.Generator().manual_seed(self.step_seed(f"epoch {epoch}"))
            order = torch.randperm(len(experience), generator=generator).to(self.device)
            for index, rows in enumerate(order.chunk(self.minibatches)):
                yield epoch == index == 0, experience[rows]

    def pretraining_term(self, replies: int) -> None:
        """Adds gamma * cross-entropy on pretraining text to the gradient of this update."""
        generator = torch.Generator().manual_seed(self.step_seed(f"text {self.updates_done}"))
        picked = torch.randint(len(self.documents), (max(1, round(self.text_ratio * replies)),), generator=generator)
        parts: list[TokenBatch] = [
            collate([self.documents[i] for i in picked[part].tolist()], self.policy.pad_id).to(self.device)
            for part in chunks(len(picked), self.micro_batch_size)
        ]
        total = self.total(torch.stack([part.loss_mask.sum() for part in parts]).sum())
        for part in parts:
            logp, _ = self.policy.logprobs(part.ids, part.attention_mask, part.position_ids, part.loss_mask)
            self.backward_mean(-logp, part.loss_mask, total, {"pretraining_loss": -logp}, scale=self.objective.gamma)

    # -- checks ---------------------------------------------------------------------------------------------------

    @property
    def exact(self) -> bool:
        """Whether arithmetic is fp32, where two ways to the same number may be held against each other."""
        return self.trainer.precision in ("32-true", "64-true")

    def check_sampler(self, rollout: Rollout, logp: Tensor) -> None:
        """The sampler must have drawn from the distribution that is scored, or KL and ratio mean nothing."""
        gaps = (rollout.logp - logp).abs()
        if self.exact:
            gap, limit, key = (gaps * rollout.mask).max(), self.tolerance, "stage.tolerance"
        else:
            gap, limit, key = masked_mean(gaps, rollout.mask), COARSE * self.tolerance, f"{COARSE} x stage.tolerance"
        if not gap <= limit:  # nan too
            raise RunFailed(
                f"the sampler's log-probabilities differ from the policy's by {gap:.2g} nats "
                f"({key}={limit:g}): the replies were not drawn from the distribution that is scored"
            )

    def check_ratio(self, ratio: Tensor, mask: Tensor) -> None:
        """Before the first update of a rollout the policy is the one that sampled: ratio 1, KL 0."""
        gap = ((ratio - 1).abs() * mask).max()
        if self.exact and not gap <= 1e-4:
            raise RunFailed(
                f"ratio differs from 1 by {gap:.2g} at the first minibatch of a rollout: dropout or padding?"
            )

    # -- what is logged -------------------------------------------------------------------------------------------

    def describe(self, rollout: Rollout, raw: Tensor, logp: Tensor, ref_logp: Tensor) -> Metrics:
        """Scores, KL (nats per reply) and the signs of reward hacking.

        Each process must call it: spreads are those of the replies of all. The other means are of this one's replies.
        """
        kl = sequence_kl(logp, ref_logp, rollout.mask)
        learnt = self.learnt(raw, rollout.ended)
        metrics = {
            **reply_metrics(rollout, raw, together=True),
            "learnt_score": learnt.mean(),
            "kl": kl.mean(),
            "kl_k3": (k3(logp, ref_logp) * rollout.mask).sum(1).mean(),
            "rlhf_reward": (learnt - self.beta * kl).mean(),
            **{f"reward/{name}": value for name, value in getattr(self.reward, "parts", {}).items()},
        }
        start = self.start.get("train" if self.trainer.training else "validation")
        if "gold" in metrics and start:
            metrics["proxy_gold_gap"] = proxy_gold_gap(metrics, start)
            error = proxy_gold_gap_error(metrics, start, count_clusters(rollout.prompts), int(start["clusters"]))
            metrics["proxy_gold_gap_se"] = raw.new_tensor(error)
        return metrics

    def of_updates(self, metrics: list[Metrics]) -> Metrics:
        """Means over the updates on a rollout, and what must be 1 and 0 at the first of them; empty without updates."""
        if not metrics:
            return {}
        names = {name: None for row in metrics for name in row}  # a step that was skipped has no norm of its gradient
        means = {name: torch.stack([row[name] for row in metrics if name in row]).mean() for name in names}
        return {**means, "first_ratio": metrics[0]["ratio"], "first_approx_kl": metrics[0]["approx_kl"]}

    def on_validation_epoch_start(self) -> None:
        """Nothing is answered yet."""
        super().on_validation_epoch_start()
        self.answers = []

    @torch.no_grad()
    def validation_step(self, batch: Parts[Prompt], batch_idx: int) -> None:
        """Replies to held-out prompts."""
        with self.averaged():
            rollout = self.rollout.sample(self.policy, list(batch), seed=self.step_seed("validation", batch_idx))
            inputs = (rollout.ids, rollout.attention_mask, rollout.position_ids, rollout.loss_mask)
            width = rollout.mask.shape[1]
            logp = self.policy.logprobs(*inputs, self.rollout.temperature)[0][:, -width:]
        ref_logp = self.reference.logprobs(*inputs, self.rollout.temperature)[:, -width:]
        self.answers.append((rollout, logp, ref_logp))

    @torch.no_grad()
    def on_validation_epoch_end(self) -> None:
        """Score and KL of all of them at once, so that spreads and whitening do not depend on how they were cut."""
        rollouts, logps, ref_logps = zip(*self.answers, strict=True)
        self.answers, whole = [], joined(rollouts, self.policy.pad_id)
        with self.trainer.precision_plugin.forward_context():
            raw = self.reward(whole).float()
            metrics = self.describe(whole, raw, side_by_side(logps), side_by_side(ref_logps))
        for name, value in metrics.items():
            self.log_share(f"val/{name}", torch.as_tensor(value), len(raw))
        super().on_validation_epoch_end()

    def prompts_to_show(self) -> list[Prompt]:
        """Held-out prompts."""
        return list(self.held_out)

    # -- the result -------------------------------------------------------------------------------------------------

    def averaged(self) -> AbstractContextManager[None]:
        """The policy with the weights that are the result: their moving average, where there is one."""
        return nullcontext() if self.average is None else self.average.applied()

    def save(self, folder: Path) -> None:
        """The policy."""
        with self.averaged():
            super().save(folder)

    def write_samples(self, count: int = 8, sampler: Sampler | None = None) -> None:
        """Replies of the policy that is saved, sampled as in training, one to a prompt."""
        with self.averaged():
            super().write_samples(count, sampler or single(self.rollout))

    def final_metrics(self) -> dict[str, float]:
        """Whether the KL budget ended the training."""
        return {} if self.kl_budget is None else {"over_kl_budget": float(self.over_budget)}
