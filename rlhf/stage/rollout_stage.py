"""Base class of reinforcement learning stages: rollouts, scores, the pretraining term, checks and diagnostics.

A subclass of ``RolloutStage`` defines how advantages come from scores and which loss they enter. Everything that must
be the same in PPO, GRPO and RLOO for a fair comparison is defined here.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from rlhf.data.batches import check_divisible
from rlhf.data.collate import TokenBatch, collate, packed
from rlhf.data.disk import store_like
from rlhf.data.encoding import encode_text
from rlhf.data.records import Prompt
from rlhf.data.split import Split
from rlhf.errors import UserError, key
from rlhf.functional.reduction import weighted_mean
from rlhf.functional.scores import Moments, ScoreScale, missing_eos
from rlhf.models.auxiliary_models import load_reference
from rlhf.models.ema import EMA
from rlhf.models.language_model import LanguageModel
from rlhf.models.offload import Offload
from rlhf.models.sharding import gathered, is_sharded
from rlhf.models.vocabulary import OWN_REFERENCE, check_vocabulary
from rlhf.objective import Metrics
from rlhf.reward.base import Reward, make_ready
from rlhf.reward.missing_eos import MISSING_EOS_PENALTY, MissingEOSOption, resolve_missing_eos
from rlhf.reward.model import find_model_rewards
from rlhf.sampler.base import Sampler, single
from rlhf.sampler.rollout import Rollout
from rlhf.stage.batch_order import Parts
from rlhf.stage.checks import check_context, check_ratio, check_sampler
from rlhf.stage.experience import Experience, chunks, score_rollout
from rlhf.stage.rollout_metrics import RolloutMetrics
from rlhf.stage.update import Optimizer, Schedule

__all__ = ["RolloutStage", "SampledObjective"]


class SampledObjective(Protocol):
    """Interface that all objectives over sampled responses share."""

    @property
    def beta(self) -> float:
        """KL coefficient, the initial one where it adapts."""

    @property
    def gamma(self) -> float:
        """Pretraining coefficient gamma: weight of the pretraining loss in the same optimizer step; 0 reads no text."""


class RolloutStage(RolloutMetrics):
    """Base class of stages that sample from the policy, score the responses, and update on them.

    Args:
        hyperparameters: Those of ``Stage``: ``batch_size`` is in prompts per rollout; ``micro_batch_size`` is in rows
            per forward pass, null: a whole minibatch.
        steps: Rollouts, each of ``batch_size`` prompts.
        epochs: Passes over each rollout.
        minibatches: Updates per pass.
        text_ratio: Rows of pretraining text per response in the pretraining term.
        text_length: Tokens in a row of pretraining text.
        missing_eos_penalty: Missing-EOS penalty, in units of the normalized and clipped score.
        score_clip: Scores are clipped to plus or minus this, null: not.
        tolerance: Largest difference per token between the sampler's log-probabilities and the policy's in fp32; of
            another sampler, or in 16 bits, the mean difference is at most 50 times as large.
        reference: Model that KL is measured against, null: the initial policy.
        normalize_scores: "none"; "batch": mean 0 and standard deviation 1 over each rollout; "running": over all
            rollouts so far.
        missing_eos: How the score of a response without EOS changes: "replace" sets it to minus the penalty, "subtract"
            subtracts the penalty, "none" leaves it; "auto" replaces under a trained reward model and leaves the scores
            of rules (``resolve_missing_eos``).
        kl_budget: Nats per response from the reference; a rollout beyond it ends the training. Null: no budget.
        ema_decay: Decay per update of an EMA of the weights, which is then validated and saved. Null: no EMA.
        offload_frozen: Whether the reference and the reward models are on the device only while they score.
    """

    reads: ClassVar[dict[str, tuple[str, ...]]] = {"data": ("prompt",), "text": ("text",)}
    progress_metrics = ("score", "kl", "length", "loss")
    headline = "val/score"
    auxiliary_models = {"reference": False}
    defaults: ClassVar[Mapping[str, Any]] = {"gradient_clip": 1.0}

    def __init__(
        self,
        model: LanguageModel,
        objective: SampledObjective,
        data: Split,
        text: Split | None,
        reward: Reward,
        sampler: Sampler,
        optimizer: Optimizer,
        scheduler: Schedule,
        *,
        steps: Annotated[int, Field(gt=0)],
        epochs: Annotated[int, Field(gt=0)],
        minibatches: Annotated[int, Field(gt=0)],
        score_clip: Annotated[float, Field(gt=0)] | None,
        text_ratio: Annotated[float, Field(gt=0)] = 1.0,
        text_length: Annotated[int, Field(gt=1)] = 64,
        tolerance: Annotated[float, Field(gt=0)] = 1e-3,
        reference: str | None = None,
        normalize_scores: ScoreScale = "none",
        missing_eos: MissingEOSOption = "auto",
        missing_eos_penalty: Annotated[float, Field(ge=0)] = MISSING_EOS_PENALTY,
        kl_budget: Annotated[float, Field(gt=0)] | None = None,
        ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None,
        offload_frozen: bool = False,
        **hyperparameters: Any,
    ) -> None:
        super().__init__(model, optimizer, scheduler, **hyperparameters)
        self.check_parts(
            objective=objective, text=text, sampler=sampler, batch_size=self.batch_size, minibatches=minibatches
        )
        if objective.gamma:
            check_context(model, text_length, "stage.text_length")
        self.objective: Any = objective
        self.data, self.text, self.reward, self.sampler = data, text, reward, sampler
        self.steps, self.epochs, self.minibatches = steps, epochs, minibatches
        self.text_ratio, self.text_length = text_ratio, text_length
        self.missing_eos_penalty, self.score_clip, self.tolerance = missing_eos_penalty, score_clip, tolerance
        self.normalize_scores = normalize_scores
        self.missing_eos = resolve_missing_eos(missing_eos, missing_eos_penalty, reward)
        self.kl_budget, self.ema_decay, self.offload_frozen = kl_budget, ema_decay, offload_frozen
        self._offloaded = {}
        self.policy.disable_dropout()
        self.reference = load_reference(model, reference)
        self.beta = objective.beta
        self.score_moments: tuple[float, float, float] = (0.0, 0.0, 0.0)
        self.start: dict[str, dict[str, float]] = {}  # scores before training, by part of the data
        self.over_budget = False
        self.correction: Metrics = {}  # of the last rollout
        self.ema: EMA | None = None
        self._ema_state: dict[str, Tensor] | None = None
        self.validation_rollouts: list[tuple[Rollout, Tensor, Tensor]] = []  # with logp and ref_logp

    @classmethod
    def check_parts(
        cls,
        *,
        batch_size: int = 1,
        minibatches: int = 1,
        world_size: int = 1,
        objective: Any = None,
        text: Any = None,
        model: Any = None,
        reference: str | None = None,
        **parts: Any,
    ) -> None:
        """Validate as ``Stage.check_parts``; also minibatches, the reference's vocabulary, and gamma without text."""
        super().check_parts(batch_size=batch_size, world_size=world_size, **parts)
        check_vocabulary(model, reference, "inputs.reference", OWN_REFERENCE)
        check_divisible(batch_size, minibatches, key("stage.minibatches", minibatches))
        if batch_size // world_size % minibatches:
            raise UserError(
                f"must divide the {batch_size // world_size} prompts of each of the {world_size} devices",
                fix=f"type a {key('stage.batch_size')} that is a multiple of {minibatches * world_size}",
                option="stage.minibatches",
                value=minibatches,
            )
        if objective is not None and objective.gamma and text is None:
            raise UserError(
                "needs pretraining text",
                fix=f"type {key('data@text', 'text')}, or {key('objective.gamma', 0)}",
                option="objective.gamma",
                value=f"{objective.gamma:g}",
            )

    @classmethod
    def unread(cls, *, objective: Any = None, **_: Any) -> tuple[str, ...]:
        """Return ("text",) if the objective has no pretraining term."""
        return () if objective is None or objective.gamma else ("text",)

    # -- set-up ---------------------------------------------------------------------------------------------------

    def roles(self) -> dict[str, Any]:
        """Return the policy, the reference and the reward models, by role."""
        rewards = {name: reward.model for name, reward in find_model_rewards(self.reward).items()}
        return {"policy": self.policy, "reference": self.reference} | rewards

    def read_examples(self) -> None:
        """Read the prompts, all of which fit the context together with a response."""
        world_size = self.trainer.world_size  # the config does not always give it
        self.check_parts(batch_size=self.batch_size, minibatches=self.minibatches, world_size=world_size)
        fitted = self.fit_prompts(self.data, self.sampler)
        self.examples, self.held_out = fitted.train, fitted.validation
        self.batches = self.order(len(self.examples), steps=self.steps)

    def prepare(self) -> None:
        """Read the prompts and the pretraining text, and move the frozen models to the device."""
        self.read_examples()
        self.reference.to(self.device)
        make_ready(self.reward, self.device, [*self.examples, *self.held_out], self.sampler.room(self.policy))
        if self.offload_frozen:
            self._offloaded = {name: Offload(models) for name, models in self.offloadable().items()}
        if self.ema_decay is not None:
            self.ema = EMA(self.policy, self.ema_decay)
            if self._ema_state is not None:
                self.ema.load(self._ema_state)
        if self.objective.gamma:
            assert self.text is not None  # check_parts
            tokenizer = self.policy.tokenizer
            documents = (encode_text(tokenizer, record.text) for record in self.text.train)
            self.documents = store_like(packed(documents, self.text_length), like=self.text.train)

    def parts(self, examples: list[Prompt]) -> Parts[Prompt]:
        """Return the prompts as records, which the sampler tokenizes; micro-batches are cut from the minibatches."""
        return Parts(examples)

    @property
    def total_updates(self) -> int:
        """Minibatches of all rollouts."""
        return self.steps * self.epochs * self.minibatches

    def schedule_position(self) -> tuple[int, int]:
        """Return rollouts done and in all: the learning rate is constant over the updates on a rollout."""
        return self.batches_done, self.steps

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def counters(self) -> dict[str, Any]:
        """Return the counters of ``Stage``, the adapted beta, the running moments and the diagnostics' baseline."""
        names = ("beta", "score_moments", "start")
        return super().counters() | {name: getattr(self, name) for name in names}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the EMA to the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the EMA of the checkpoint until ``prepare`` loads it, once the weights are on their device."""
        super().on_load_checkpoint(checkpoint)
        self._ema_state = checkpoint.get("ema")

    # -- scores and updates ---------------------------------------------------------------------------------------

    def sample_rollout(self, prompts: list[Prompt]) -> Rollout:
        """Sample the rollout of this batch.

        A sharded policy is whole meanwhile, because ranks end at different decode steps.
        """
        with gathered(self.policy):
            return self.sampler.sample(self.policy, prompts, seed=self.step_seed("sample"))

    def scores(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Return the raw reward and the shaped score of each response of a training rollout, [B] each."""
        if self.updates_done == 0:
            self.measure_start()
        raw = self.raw_scores(rollout)
        if self.normalize_scores != "none":
            before = Moments(*self.score_moments) if self.normalize_scores == "running" else Moments()
            now = before.updated(raw, self.sum_over_ranks)
            self.score_moments = (now.count, now.mean, now.squares)
        return raw, self.shape_scores(raw, rollout.ended)

    def shape_scores(self, raw: Tensor, ended: Tensor) -> Tensor:
        """Return the scores [B] normalized, clipped, and with the missing-EOS penalty applied."""
        scores = raw if self.normalize_scores == "none" else Moments(*self.score_moments).normalize(raw)
        if self.score_clip is not None:
            scores = scores.clamp(-self.score_clip, self.score_clip)
        return missing_eos(scores, ended, self.missing_eos_penalty, self.missing_eos)

    def rows_per_pass(self, rollout: Rollout) -> int:
        """Return the rows per forward pass over a whole rollout: those of a micro-batch, or else of a minibatch."""
        return self.micro_batch_size or -(-len(rollout.texts) // self.minibatches)

    @torch.no_grad()
    def rollout_logprobs(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities [B, R] of the response tokens under the policy that sampled and the reference.

        Those of a sampler that is the policy itself are the policy's, and are not computed again: the pass of the first
        minibatch, which computes them anyway, is compared with them (``check_first``). Another sampler's are compared
        here.

        Raises:
            RunFailed: The rollout was not sampled from the policy.
        """
        size, temperature = self.rows_per_pass(rollout), self.sampler.temperature
        with self.frozen_on_device("reference"):
            ref_logp = score_rollout(lambda tokens: self.reference.logprobs(tokens, temperature), rollout, size)
        if self.trusts_sampler:
            return rollout.logp, ref_logp
        logp = score_rollout(lambda tokens: self.policy.logprobs(tokens, temperature)[0], rollout, size)
        check_sampler(rollout.logp, logp, rollout.mask, self.tolerance, exact=False)
        return logp, ref_logp

    def check_first(self, logp: Tensor, old_logp: Tensor, mask: Tensor) -> None:
        """Check the log-probabilities [B, R] of the first minibatch of a rollout, where no update was made yet.

        Raises:
            RunFailed: They differ from the sampler's, or the importance ratio is not 1. In 16 bits nothing is checked.
        """
        if self.trusts_sampler:
            check_sampler(old_logp, logp.detach(), mask, self.tolerance, exact=True)
        elif self.is_exact:
            check_ratio((logp.detach() - old_logp).exp(), mask)

    def sampler_weights(self, rollout: Rollout, logp: Tensor) -> Tensor | None:
        """Return the weights [B, R] of the policy-gradient term that correct the sampler; None: there are none."""
        found = None if self.trusts_sampler else self.objective.sampler_weights(logp, rollout.logp, rollout.mask)
        if found is None:
            return None
        weights, beyond = found
        total = self.loss_denominator(rollout.mask.sum())
        self.correction = {
            "sampler_weight": weighted_mean(weights, rollout.mask.float(), total),
            "sampler_bounded": weighted_mean(beyond.float(), rollout.mask.float(), total),
        }
        return weights

    def is_within_kl_budget(self, kl: float) -> bool:
        """Return whether the rollout, at ``kl`` nats per response, may be trained on; end the training otherwise."""
        if self.kl_budget is None or kl <= self.kl_budget:
            return True
        self.stop(kl)
        return False

    def stop(self, kl: float) -> None:
        """End the training before the updates on this rollout; the policy that sampled it is saved."""
        self.over_budget = True
        self.trainer.should_stop = True
        self.note(
            f"rollout {self.batches_done + 1} of {self.steps} is {kl:.1f} nats per response from the reference, more "
            f"than stage.kl_budget={self.kl_budget}: training ends here, the policy is saved"
        )

    def step(self, frozen: nn.Module | None = None) -> Metrics:
        """Make one optimizer step and update the EMA, unless the step was skipped."""
        metrics = super().step(frozen)
        if self.ema is not None and not metrics.get("skipped_steps"):
            self.ema.update()
        return metrics

    def draw_minibatches(self, experience: Experience) -> Iterator[tuple[Experience, bool]]:
        """Yield the minibatches of all epochs, each epoch in its own order.

        The flag marks the first minibatch, where the policy is still the one that sampled.
        """
        for epoch in range(self.epochs):
            generator = torch.Generator().manual_seed(self.step_seed(f"epoch {epoch}"))
            order = torch.randperm(len(experience), generator=generator).to(self.device)
            for index, rows in enumerate(order.chunk(self.minibatches)):
                # Samples of a prompt side by side, so that a pass computes the prompt once.
                ordered = rows.sort().values if self.sampler.samples > 1 else rows
                yield experience[ordered], epoch == index == 0

    def pretraining_term(self, responses: int) -> None:
        """Add gamma * cross-entropy on pretraining text to the gradient of this update."""
        generator = torch.Generator().manual_seed(self.step_seed(f"text {self.updates_done}"))
        picked = torch.randint(len(self.documents), (max(1, round(self.text_ratio * responses)),), generator=generator)
        parts: list[TokenBatch] = [
            collate([self.documents[i] for i in picked[part].tolist()], self.policy.pad_id).to(self.device)
            for part in chunks(len(picked), self.micro_batch_size)
        ]
        total = self.loss_denominator(torch.stack([part.loss_mask.sum() for part in parts]).sum())
        for part in parts:
            logp, _ = self.policy.logprobs(part, uniform=True)
            self.backward_mean(-logp, part.loss_mask, total, {"pretraining_loss": -logp}, scale=self.objective.gamma)

    # -- the result -----------------------------------------------------------------------------------------------

    def make_whole(self) -> None:
        """Make sharded models whole, the policy with its EMA weights if there are any."""
        if self.ema is None or not is_sharded(self.policy):
            super().make_whole()
            return
        with self.ema.applied():
            super().make_whole()
        self.ema = None  # the policy has its weights

    def ema_weights(self) -> AbstractContextManager[None]:
        """Return a context manager that applies the EMA weights to the policy; without EMA it does nothing."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def save(self, folder: Path) -> None:
        """Write the policy, with its EMA weights if there are any."""
        with self.ema_weights():
            super().save(folder)

    def write_samples(self, count: int = 8, sampler: Sampler | None = None) -> None:
        """Write one response per prompt of the saved policy, sampled as in training."""
        with self.ema_weights():
            super().write_samples(count, sampler or single(self.sampler))

    def final_metrics(self) -> dict[str, float]:
        """Return whether the KL budget ended the training; empty without a budget."""
        return {} if self.kl_budget is None else {"over_kl_budget": float(self.over_budget)}
