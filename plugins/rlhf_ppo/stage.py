"""PPO on a language model (Stiennon et al. 2020, Ouyang et al. 2022).

1. Sample a reply to each prompt from the policy.
2. Score the whole reply; give every token its share of the KL penalty: r_t = -beta log(pi/pi_SFT)_t, + R at the end.
3. Advantages by GAE, whitened over the whole rollout.
4. A few epochs of clipped updates over minibatches, each one optimizer step on L_PPO + gamma * L_pretraining.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from rlhf.data.collate import TokenBatch, collate, pack
from rlhf.data.data import Split
from rlhf.data.records import Prompt
from rlhf.data.template import encode_text
from rlhf.errors import RunFailed, UserError
from rlhf.functional.advantages import explained_variance, sequence_kl
from rlhf.functional.kl import k3
from rlhf.functional.masking import masked_mean
from rlhf.functional.scores import MissingEnd, Moments, ScoreScale, missing_end
from rlhf.models.average import MovingAverage
from rlhf.models.language_model import LanguageModel
from rlhf.models.roles import reference_of, require_same_vocabulary
from rlhf.models.scalar import ScalarModel
from rlhf.objective import Metrics, PolicyObjective
from rlhf.rollout import Rollout, Sampler
from rlhf.scoring import Reward, make_ready
from rlhf.stage import Optimizer, Parts, Schedule, Stage, check_context, chunks

#: In 16 bits single log-probabilities may be off by tenths; their mean gap may be this many times the tolerance.
COARSE = 50


@dataclass(frozen=True)
class Experience:
    """What an update reads of a rollout. Rows are prompt + reply; the last R columns are the reply."""

    ids: Tensor  # [B, P+R]
    attention_mask: Tensor  # [B, P+R]
    position_ids: Tensor  # [B, P+R]
    loss_mask: Tensor  # [B, P+R], 1 on the reply
    mask: Tensor  # [B, R]
    logp: Tensor  # [B, R], of the policy that sampled
    ref_logp: Tensor  # [B, R]
    values: Tensor  # [B, R]
    advantages: Tensor  # [B, R]
    returns: Tensor  # [B, R]

    def __getitem__(self, rows: Tensor | slice) -> "Experience":
        return Experience(*(getattr(self, field.name)[rows] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.ids)


class PPOStage(Stage):
    """Proximal policy optimisation with a learnt critic.

    Args:
        steps: Rollouts, each of ``batch_size`` prompts.
        batch_size: Prompts per rollout.
        epochs: Passes over each rollout.
        minibatches: Updates per pass.
        micro_batch_size: Rows per forward pass, null: a whole minibatch.
        gradient_clip: Largest gradient norm, null: none.
        reference: Model that KL is measured against, null: the policy as it starts.
        value: Where the critic starts: model of a reward run, or null for the policy's own weights and a zero head.
        value_warmup: Rollouts at the start that train the critic alone.
        text_ratio: Rows of pretraining text per reply in the gamma term.
        text_length: Tokens in a row of pretraining text.
        normalize_scores: "none"; "batch": mean 0 and deviation 1 over each rollout; "running": over all so far.
        score_clip: Scores are then clipped to plus or minus this, null: not.
        missing_end: What is done to the score of a reply that did not end by itself: "subtract" takes the penalty
            off, "replace" makes it minus the penalty.
        missing_end_penalty: That penalty, in units of the score as it is by then.
        kl_budget: Nats per reply from the reference; a rollout beyond it ends the training. Null: no budget.
        average: Decay per update of a moving average of the weights, which is then what is validated and saved. Null:
            none.
        tolerance: Largest difference between the sampler's log-probabilities and recomputed ones in fp32.
    """

    telling = ("score", "kl", "length", "loss")
    headline = "val/score"

    def __init__(
        self,
        model: LanguageModel,
        objective: PolicyObjective,
        data: Split,
        text: Split | None,
        reward: Reward,
        rollout: Sampler,
        optimizer: Optimizer,
        scheduler: Schedule,
        *,
        steps: Annotated[int, Field(gt=0)] = 40,
        batch_size: Annotated[int, Field(gt=0)] = 128,
        epochs: Annotated[int, Field(gt=0)] = 2,
        minibatches: Annotated[int, Field(gt=0)] = 4,
        micro_batch_size: Annotated[int, Field(gt=0)] | None = None,
        gradient_clip: Annotated[float, Field(gt=0)] | None = 1.0,
        reference: str | None = None,
        value: str | None = None,
        value_warmup: Annotated[int, Field(ge=0)] = 0,
        text_ratio: Annotated[float, Field(gt=0)] = 1.0,
        text_length: Annotated[int, Field(gt=1)] = 64,
        normalize_scores: ScoreScale = "none",
        score_clip: Annotated[float, Field(gt=0)] | None = 5.0,
        missing_end: MissingEnd = "subtract",
        missing_end_penalty: Annotated[float, Field(ge=0)] = 1.0,
        kl_budget: Annotated[float, Field(gt=0)] | None = None,
        average: Annotated[float, Field(ge=0, lt=1)] | None = None,
        tolerance: Annotated[float, Field(gt=0)] = 1e-3,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            scheduler,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            gradient_clip=gradient_clip,
        )
        if not rollout.exact or rollout.samples != 1:
            raise UserError(
                "PPO samples one reply per prompt from the policy's own distribution: "
                "type rollout.top_k=0 rollout.top_p=1 rollout.samples=1 and a rollout.temperature above 0"
            )
        if batch_size % minibatches:
            raise UserError(
                f"stage.batch_size={batch_size} is not a multiple of stage.minibatches={minibatches}: "
                f"type stage.batch_size={-(-batch_size // minibatches) * minibatches}"
            )
        check_context(model, text_length, "stage.text_length")
        self.objective, self.data, self.text, self.reward, self.rollout = objective, data, text, reward, rollout
        self.steps, self.epochs, self.minibatches, self.value_warmup = steps, epochs, minibatches, value_warmup
        self.text_ratio, self.text_length = text_ratio, text_length
        self.normalize_scores, self.score_clip = normalize_scores, score_clip
        self.missing_end, self.missing_end_penalty = missing_end, missing_end_penalty
        self.kl_budget, self.average_decay, self.tolerance = kl_budget, average, tolerance
        self.policy.disable_dropout()
        self.reference = reference_of(model, reference)
        self.critic = ScalarModel.load(value) if value else ScalarModel(copy.deepcopy(model), zero_init=True)
        self.critic.disable_dropout()
        if value:
            instead = "stage.value=null stage.value_warmup=4 (a critic of the policy's own weights)"
            require_same_vocabulary(model.tokenizer, self.critic.tokenizer, f"stage.value={value}", instead)
        self.beta = objective.beta
        self.score_moments: tuple[float, float, float] = (0.0, 0.0, 0.0)
        self.over_budget = False
        self.average: MovingAverage | None = None
        self._average_state: dict[str, Tensor] | None = None

    # -- set-up ---------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Prompts, the stream of pretraining text, and the frozen models on the device."""
        mine = self.batch_size // self.trainer.world_size
        if mine % self.minibatches:
            raise UserError(
                f"stage.minibatches={self.minibatches} does not divide the {mine} prompts of each of the "
                f"{self.trainer.world_size} processes: type a stage.batch_size that is a multiple of "
                f"{self.minibatches * self.trainer.world_size}"
            )
        self.reference.to(self.device)
        prompts = [*self.data.train, *self.data.validation]
        self.rollout.check(self.policy, prompts)
        make_ready(self.reward, self.device, prompts, self.rollout.max_new_tokens)
        self.examples, self.held_out = self.data.train, self.data.validation
        self.batches = self.order(len(self.examples), steps=self.steps)
        if self.average_decay is not None:
            self.average = MovingAverage(self.policy, self.average_decay)
            if self._average_state is not None:
                self.average.load(self._average_state)
        if self.objective.gamma:
            if self.text is None:
                raise UserError("objective.gamma > 0 needs pretraining text: type text=text, or objective.gamma=0")
            tokenizer = self.policy.tokenizer
            self.documents = pack([encode_text(tokenizer, record.text) for record in self.text.train], self.text_length)

    def parts(self, examples: list[Prompt]) -> Parts[Prompt]:
        """Prompts stay records, which the sampler tokenises; micro-batches are cut from the minibatches."""
        return Parts(examples)

    @property
    def total_updates(self) -> int:
        """Minibatches of all rollouts."""
        return self.steps * self.epochs * self.minibatches

    def modules_trained(self) -> list[nn.Module]:
        """Policy and critic."""
        return [self.policy, self.critic]

    def schedule_position(self) -> tuple[int, int]:
        """The learning rate stays the same for all updates on a rollout."""
        return self.batches_done, self.steps

    def counters(self) -> dict[str, Any]:
        """The adapted beta and the running moments too, which other frameworks forget."""
        return super().counters() | {"beta": self.beta, "score_moments": self.score_moments}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The moving average too."""
        super().on_save_checkpoint(checkpoint)
        if self.average is not None:
            checkpoint["average"] = self.average.state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Taken up again in ``prepare``, once the weights are on their device."""
        super().on_load_checkpoint(checkpoint)
        self._average_state = checkpoint.get("average")

    # -- the algorithm --------------------------------------------------------------------------------------------

    def training_step(self, batch: Parts[Prompt], batch_idx: int) -> None:
        """One rollout and the updates on it."""
        rollout = self.rollout.sample(self.policy, list(batch), seed=self.step_seed("sample"))
        raw = self.reward(rollout).float()
        self.see(raw)
        experience = self.evaluate(rollout, self.treated(raw, rollout.ended))
        kl = self.mean_over_processes(sequence_kl(experience.logp, experience.ref_logp, experience.mask))
        metrics: list[Metrics] = []
        if self.kl_budget is None or kl <= self.kl_budget:
            for first, minibatch in self.order_of_updates(experience):
                metrics.append(self.update(minibatch, first))
        else:
            self.stop(kl)
        self.report(rollout, raw, experience, metrics)
        self.beta = self.objective.next_beta(self.beta, kl, self.batch_size)

    def see(self, raw: Tensor) -> None:
        """Takes a rollout's scores [B] into the moments they are normalised by."""
        if self.normalize_scores != "none":
            before = Moments(*self.score_moments) if self.normalize_scores == "running" else Moments()
            now = before.updated(raw, self.sum_over_processes)
            self.score_moments = (now.count, now.mean, now.squares)

    def treated(self, raw: Tensor, ended: Tensor) -> Tensor:
        """The scores that are learnt from, [B]: normalised, clipped, and worse for replies that did not end."""
        scores = raw if self.normalize_scores == "none" else Moments(*self.score_moments).normalize(raw)
        if self.score_clip is not None:
            scores = scores.clamp(-self.score_clip, self.score_clip)
        return missing_end(scores, ended, self.missing_end_penalty, self.missing_end)

    def mean_over_processes(self, values: Tensor) -> float:
        """Mean of the values [B] of all processes."""
        total, count = self.sum_over_processes(torch.stack([values.sum(), values.new_tensor(len(values))])).tolist()
        return total / count

    def stop(self, kl: float) -> None:
        """Ends the training before this rollout is learnt from: what is saved is the policy that sampled it."""
        self.over_budget = True
        self.trainer.should_stop = True
        self.note(
            f"rollout {self.batches_done + 1} of {self.steps} is {kl:.1f} nats per reply from the reference, more than "
            f"stage.kl_budget={self.kl_budget}: training ends here, the policy is saved"
        )

    @torch.no_grad()
    def evaluate(self, rollout: Rollout, scores: Tensor) -> Experience:
        """Log-probabilities, values, advantages and returns of a rollout."""
        inputs = (rollout.ids, rollout.attention_mask, rollout.position_ids, rollout.loss_mask)
        width, temperature = rollout.mask.shape[1], self.rollout.temperature
        rows = chunks(len(rollout.ids), self.micro_batch_size or self.batch_size // self.minibatches)
        logp, ref_logp, values = (
            torch.cat(parts)
            for parts in zip(
                *(
                    (
                        self.policy.logprobs(*(x[part] for x in inputs), temperature)[0][:, -width:],
                        self.reference.logprobs(*(x[part] for x in inputs), temperature)[:, -width:],
                        self.critic.values(*(x[part] for x in inputs[:3]))[:, -width - 1 : -1],
                    )
                    for part in rows
                ),
                strict=True,
            )
        )
        self.check_sampler(rollout, logp)
        values = values.float() * rollout.mask
        _, advantages, returns = self.objective.estimate(
            scores, logp, ref_logp, values, rollout.mask, self.beta, self.sum_over_processes
        )
        return Experience(*inputs, rollout.mask, logp, ref_logp, values, advantages, returns)

    def order_of_updates(self, experience: Experience) -> Iterator[tuple[bool, Experience]]:
        """Minibatches, every epoch in an order of its own; the flag marks the first, where the ratio must be 1."""
        for epoch in range(self.epochs):
            generator = torch.Generator().manual_seed(self.step_seed(f"epoch {epoch}"))
            order = torch.randperm(len(experience), generator=generator).to(experience.ids.device)
            for index, rows in enumerate(order.chunk(self.minibatches)):
                yield epoch == index == 0, experience[rows]

    def update(self, minibatch: Experience, first: bool) -> Metrics:
        """One optimizer step on L_PPO + gamma * L_pretraining."""
        total = self.total(minibatch.mask.sum())
        warming = self.batches_done < self.value_warmup
        for part in chunks(len(minibatch), self.micro_batch_size):
            x = minibatch[part]
            width = x.mask.shape[1]
            logp, entropy = self.policy.logprobs(
                x.ids, x.attention_mask, x.position_ids, x.loss_mask, self.rollout.temperature, entropy=True
            )
            assert entropy is not None
            logp, entropy = logp[:, -width:], entropy[:, -width:]
            values = self.critic.values(x.ids, x.attention_mask, x.position_ids)[:, -width - 1 : -1].float()
            losses, metrics = self.objective(logp, x.logp, x.advantages, values, x.values, x.returns, entropy)
            if first:
                self.check_ratio(metrics["ratio"], x.mask)
            self.backward_mean(losses, x.mask, total, metrics)
            self.count(len(x), x.attention_mask.sum())
        if self.objective.gamma and not warming:
            self.pretraining_term(len(minibatch))
        metrics_of_step = self.step(frozen=self.policy if warming else None)  # waits for a critic that has seen returns
        if self.average is not None:
            self.average.update()
        return metrics_of_step

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
            raise RunFailed(f"ratio is off 1 by {gap:.2g} at the first minibatch of a rollout: dropout or padding?")

    # -- what is logged -------------------------------------------------------------------------------------------

    def report(self, rollout: Rollout, raw: Tensor, experience: Experience, metrics: list[Metrics]) -> None:
        """One row per rollout: means over its updates, if there were any, and what the replies are like."""
        row = self.describe(rollout, raw, experience.logp, experience.ref_logp)
        if metrics:
            row |= {name: torch.stack([update[name] for update in metrics]).mean() for name in metrics[0]}
            row |= {"first_ratio": metrics[0]["ratio"], "first_approx_kl": metrics[0]["approx_kl"]}
        self.record(
            row,
            explained_variance=explained_variance(experience.values, experience.returns, experience.mask),
            value=masked_mean(experience.values, experience.mask),
            beta=self.beta,
        )

    def describe(self, rollout: Rollout, raw: Tensor, logp: Tensor, ref_logp: Tensor) -> Metrics:
        """Score, KL (nats per reply) and the signs of reward hacking."""
        kl = sequence_kl(logp, ref_logp, rollout.mask)
        learnt = self.treated(raw, rollout.ended)
        return {
            "score": raw.mean(),
            "score_std": raw.std(),
            "learnt_score": learnt.mean(),
            "kl": kl.mean(),
            "kl_k3": (k3(logp, ref_logp) * rollout.mask).sum(1).mean(),
            "rlhf_reward": (learnt - self.beta * kl).mean(),
            **rollout.diagnostics(),
            **{f"reward/{name}": value for name, value in getattr(self.reward, "parts", {}).items()},
        }

    @torch.no_grad()
    def validation_step(self, batch: Parts[Prompt], batch_idx: int) -> None:
        """Score and KL on held-out prompts."""
        with self.averaged():
            rollout = self.rollout.sample(self.policy, list(batch), seed=self.step_seed("validation", batch_idx))
            inputs = (rollout.ids, rollout.attention_mask, rollout.position_ids, rollout.loss_mask)
            width = rollout.mask.shape[1]
            logp = self.policy.logprobs(*inputs, self.rollout.temperature)[0][:, -width:]
        ref_logp = self.reference.logprobs(*inputs, self.rollout.temperature)[:, -width:]
        metrics = self.describe(rollout, self.reward(rollout).float(), logp, ref_logp)
        self.log_dict(
            {f"val/{name}": value for name, value in metrics.items()},
            batch_size=len(batch),
            on_step=False,
            on_epoch=True,
            sync_dist=self.trainer.world_size > 1,
        )

    def prompts_to_show(self) -> list[Prompt]:
        """Held-out prompts."""
        return list(self.held_out)

    # -- the result -----------------------------------------------------------------------------------------------

    def averaged(self) -> AbstractContextManager[None]:
        """The policy with the weights that are the result: their moving average, where there is one."""
        return nullcontext() if self.average is None else self.average.applied()

    def save(self, folder: Path) -> None:
        """The policy; the critic beside it."""
        with self.averaged():
            super().save(folder)
        self.critic.save(folder.parent / "critic")

    def write_samples(self, count: int = 8, sampler: Sampler | None = None) -> None:
        """Replies of the policy that is saved."""
        with self.averaged():
            super().write_samples(count, sampler)

    def final_metrics(self) -> dict[str, float]:
        """Whether the KL budget ended the training."""
        return {} if self.kl_budget is None else {"over_kl_budget": float(self.over_budget)}
