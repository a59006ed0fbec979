"""Rejection sampling fine-tuning (Llama 2, section 3.2.3): K replies per prompt, the best becomes a demonstration."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from rlhf.batch_file import BatchFile
from rlhf.best_of_k import kl_bound, rollout_of
from rlhf.data.data import Split
from rlhf.data.records import Demonstration, Message, Prompt
from rlhf.diagnostics import count_clusters, look, proxy_gold_gap, proxy_gold_gap_error, reply_metrics
from rlhf.errors import UserError
from rlhf.functional.advantages import sequence_kl
from rlhf.functional.scores import missing_end
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.language_model import LanguageModel, Reference
from rlhf.models.precision import Precision
from rlhf.models.roles import copy_of_start, start_of
from rlhf.objective import TokenObjective
from rlhf.progress import work_of
from rlhf.report import diagnostics
from rlhf.rollout import Rollout, Sampler
from rlhf.scoring import MISSING_END_PENALTY, MissingEndOption, Reward, make_ready, resolve_missing_end
from rlhf.stage import Optimizer, Schedule, chunks, seed_of
from rlhf.supervised import Supervised
from rlhf_rejection_sampling.picks import Candidate, Selection, pick, read_picks, worth, write_picks

JUDGED = 400  # held-out prompts on which the result is scored; the standard error is then 1/20 of the spread
HELD_OUT = -1  # number of the batch of held-out prompts among those of training prompts


class RejectionSamplingStage(Supervised):
    """Picks among K replies of a policy by a reward, then fine-tunes on the picks with the loss of SFT.

    Args:
        batch_size: Picks per update, and prompts answered at a time.
        micro_batch_size: Rows per forward pass, null: all.
        gradient_clip: Largest gradient norm, null: none.
        epochs: Times each pick is seen.
        packing: Tokens in a row of several dialogues; null: one dialogue a row, padded.
        select: "best_per_prompt" is the best reply to each of the N prompts; "top_overall" the N best distinct replies
            of all. "random_per_prompt" and "random_overall" are their controls: as many picks, without the reward.
        missing_end: What is done to the score of a candidate without EOS before picking; as ``RolloutStage``.
        missing_end_penalty: Missing-EOS penalty, in units of the reward.
        sampler: Model that answers the prompts; null: the one that is trained, as it starts.
        earlier: Runs (or files) whose picks stand for choice beside the new replies, scored by this run's reward.
        keep_earlier: Whether they do.
    """

    reads: ClassVar[dict[str, tuple[str, ...]]] = {"data": ("prompt",)}
    headline = "val/score_gain"
    models_beside = {"sampler": False}

    def __init__(
        self,
        model: LanguageModel,
        objective: TokenObjective,
        data: Split,
        reward: Reward,
        rollout: Sampler,
        optimizer: Optimizer,
        scheduler: Schedule,
        *,
        batch_size: Annotated[int, Field(gt=0)] = 32,
        micro_batch_size: Annotated[int, Field(gt=0)] | None = None,
        gradient_clip: Annotated[float, Field(gt=0)] | None = 1.0,
        epochs: Annotated[float, Field(gt=0)] = 2,
        packing: Annotated[int, Field(gt=1)] | None = None,
        select: Selection = "best_per_prompt",
        missing_end: MissingEndOption = "auto",
        missing_end_penalty: Annotated[float, Field(ge=0)] = MISSING_END_PENALTY,
        sampler: str | None = None,
        earlier: str | list[str] | None = None,
        keep_earlier: bool = True,
    ) -> None:
        self.check_parts(rollout=rollout)
        super().__init__(
            model,
            objective,
            data,
            optimizer,
            scheduler,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            gradient_clip=gradient_clip,
            epochs=epochs,
            packing=packing,
        )
        self.reward, self.rollout, self.select, self.sampler = reward, rollout, select, sampler
        self.missing_end = resolve_missing_end(missing_end, missing_end_penalty, reward)
        self.missing_end_penalty = missing_end_penalty
        sources = [earlier] if isinstance(earlier, str) else list(earlier or ())
        self.earlier = [candidate for source in sources for candidate in read_picks(source)] if keep_earlier else []
        self.start = copy_of_start(model) if self.samples_itself else None
        self.gain: dict[str, float] = {}

    @classmethod
    def check_parts(cls, *, rollout: Sampler | None = None, **parts: Any) -> None:
        """As ``Stage.check_parts``."""
        super().check_parts(**parts)
        if rollout is None:
            return
        if rollout.samples < 2:
            raise UserError(f"rollout.samples={rollout.samples}: the best of one is no choice; type rollout.samples=4")
        rollout.require_single_turn("a pick is a single reply")

    # -- sampling and picking -------------------------------------------------------------------------------------

    @property
    def picks_file(self) -> Path:
        """The picks: one JSON line each; whole or not there."""
        return self.run_folder / "picks.jsonl"

    @property
    def best_of_k_file(self) -> Path:
        """What the best of k replies are worth, and the sampler's replies to held-out prompts."""
        return self.run_folder / "best_of_k.json"

    def prepare(self) -> None:
        """Samples, picks, tokenises."""
        self.data = self.fit_prompts(self.data, self.rollout, held_out_answered=JUDGED)
        make_ready(self.reward, self.device, [*self.data.train, *self.judged], self.rollout.max_new_tokens)
        if not self.best_of_k_file.exists():  # written last; without it only what is missing is sampled
            self.trainer.strategy.barrier()
            replies = self.sample()
            self.trainer.strategy.barrier()
            if self.trainer.is_global_zero:
                self.choose(replies.read())
            self.trainer.strategy.barrier()
        self.policy.train()
        self.read_examples()

    def read_examples(self) -> None:
        """Tokenises the picks."""
        if not self.best_of_k_file.exists():
            raise UserError(
                f"stage={self.name} trains on picks among replies that have not been sampled yet ({self.run_folder} "
                "has none): run it first; rlhf inspect data shows its prompts"
            )
        self.found = json.loads(self.best_of_k_file.read_text(encoding="utf-8"))
        candidates = read_picks(str(self.picks_file))
        picks = [
            Demonstration((*candidate.prompt.messages, Message("assistant", candidate.reply)), candidate.ended)
            for candidate in candidates
            if candidate.reply  # an empty pick teaches nothing
        ]
        encoded, report = self.data.data.encode(self.policy.tokenizer, picks)
        self.note(
            f"{len(candidates)} picks: {report}, {len(candidates) - len(picks)} empty, "
            f"{sum(candidate.temperature is None for candidate in candidates)} of earlier rounds"
        )
        held_out = max(1, len(encoded) // 20)
        self.examples, self.held_out = encoded[held_out:], encoded[:held_out]
        if not self.examples:
            raise UserError(f"{len(encoded)} picks are too few to train on: type a larger data.size")
        self.arrange()

    @property
    def judged(self) -> list[Prompt]:
        """Held-out prompts on which the trained policy is scored."""
        return list(self.data.validation[:JUDGED])

    @property
    def asked(self) -> list[Prompt]:
        """Training prompts; where batches are limited, only as many as can be trained on."""
        limit = self.trainer.limit_train_batches
        prompts = list(self.data.train)
        return prompts[: (int(limit) + 1) * self.batch_size] if isinstance(limit, int) else prompts

    @property
    def samples_itself(self) -> bool:
        """Whether the policy that is trained answers the prompts: the same weights, and a fresh adapter is nothing."""
        return self.sampler is None or CausalLM(self.sampler, None, None).folder == self.policy.origin

    def sampling_policy(self) -> LanguageModel:
        """Who answers the prompts: another model, as it is, or the one that will be trained."""
        if self.sampler is None or self.samples_itself:
            return self.policy
        spec = CausalLM(path=self.sampler, architecture=None, vocab_size=None)
        if self.policy.shared is not None:
            return self.policy.shared.language_model(self.sampler).to(self.device)
        precision = Precision("bf16-true" if self.trainer.precision == "bf16-true" else "32-true")
        return spec.load(NoAdapter(), precision).frozen().to(self.device)

    def who_sampled(self) -> Reference:
        """Who answered the prompts, once the policy is trained."""
        if self.samples_itself:
            return start_of(self.policy, self.start)
        return Reference(self.sampling_policy(), shared=self.policy.shared is not None)

    def sample(self) -> BatchFile:
        """K replies to each training prompt and one to each held-out one, by all processes, batch by batch."""
        trainer, prompts = self.trainer, self.asked
        file = BatchFile(self.run_folder, "replies", trainer.global_rank, trainer.world_size)
        batches = [prompts[start : start + self.batch_size] for start in range(0, len(prompts), self.batch_size)]
        todo = list(file.mine(len(batches)))
        held_out = self.judged and trainer.is_global_zero and HELD_OUT not in file.done
        if not todo and not held_out:
            return file
        policy = self.sampling_policy().eval()
        total = -(-len(batches) // trainer.world_size)
        with work_of(self, "sampling", total, "batch", start=total - len(todo), always=True) as meter:
            for index in todo:
                seed = seed_of(self.seed, "sample", index * self.batch_size)
                keep(file, index, self.rollout.sample(policy, batches[index], seed))
                meter.advance()
        if held_out:
            keep(file, HELD_OUT, self.answers(policy))
        return file

    @torch.no_grad()
    def choose(self, replies: dict[int, dict[str, Any]]) -> None:
        """Scores the replies and the picks of earlier rounds, picks, and writes what was picked and what it is worth.

        Args:
            replies: What was sampled, by batch.
        """
        held_out = replies.pop(HELD_OUT, {"texts": [], "ended": []})
        prompts, spread = self.asked, getattr(self.rollout, "spread", [self.rollout.temperature] * self.rollout.samples)
        rows = [row for batch in replies.values() for row in zip(batch["texts"], batch["ended"], strict=True)]
        candidates = [
            Candidate(prompts[index // len(spread)], text, ended, spread[index % len(spread)])
            for index, (text, ended) in enumerate(rows)
        ]
        candidates += [Candidate(c.prompt, c.reply, c.ended, None) for c in self.earlier]
        ended = torch.tensor([candidate.ended for candidate in candidates])
        scores = missing_end(self.scores(candidates).cpu(), ended, self.missing_end_penalty, self.missing_end)
        for candidate, score in zip(candidates, scores.tolist(), strict=True):
            candidate.score = score
        picks = pick(candidates, self.select, len(prompts), seed_of(self.seed, "pick"))
        content = worth(scores[: len(rows)].view(len(prompts), -1), spread, picks)
        gains = {int(k): gain for k, gain in content["gain_by_k"].items()}
        diagnostics.best_of_k(gains, content["gain_per_log_k"], self.run_folder / "best_of_k.png")
        write_picks(self.picks_file, picks)
        content |= {"held_out_replies": held_out["texts"], "held_out_ended": held_out["ended"]}
        temporary = self.best_of_k_file.with_name(".best_of_k.json")
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.rename(self.best_of_k_file)

    def scores(self, candidates: Sequence[Candidate]) -> torch.Tensor:
        """What the reward says of all candidates, [C]: in one call, so that all stand on one scale."""
        return self.reward(
            rollout_of(
                self.policy,
                [candidate.prompt for candidate in candidates],
                [candidate.reply for candidate in candidates],
                [candidate.ended for candidate in candidates],
            )
        ).float()

    # -- what it was worth ----------------------------------------------------------------------------------------

    def answers(self, policy: LanguageModel) -> Rollout:
        """One reply to each held-out prompt at temperature 1; the same noise before and after training."""
        return self.judging.sample(policy, self.judged, seed_of(self.seed, "judge"))

    @property
    def judging(self) -> Sampler:
        """How held-out prompts are answered."""
        return Sampler(self.rollout.max_new_tokens)

    def kl(self, rollout: Rollout) -> dict[str, torch.Tensor]:
        """KL(policy || who sampled) in nats per reply of the policy, by k1 and by k3; without common tokens none.

        The policy's own replies, uncut and at the temperature of ``judging``, so that k1 is unbiased.
        """
        other = self.who_sampled()
        if other.modules[0].tokenizer.get_vocab() != self.policy.tokenizer.get_vocab():
            self.note(f"stage.sampler={self.sampler} has another vocabulary than the policy: val/kl is not measured")
            return {}
        ids, seen, positions, mask = rollout.ids, rollout.attention_mask, rollout.position_ids, rollout.loss_mask
        k1s, k3s = [], []
        for rows in chunks(len(ids), self.micro_batch_size or self.batch_size):
            inputs = (ids[rows], seen[rows], positions[rows], mask[rows], self.judging.temperature)
            logp, ref_logp = self.policy.logprobs(*inputs)[0], other.logprobs(*inputs)
            k1s.append(sequence_kl(logp, ref_logp, mask[rows]))
            k3s.append(sequence_kl(logp, ref_logp, mask[rows], "k3"))
        return {"kl": torch.cat(k1s).mean(), "kl_k3": torch.cat(k3s).mean()}

    def finish(self) -> None:
        """Scores the trained policy on held-out prompts, beside the one that sampled."""
        self.trainer.strategy.barrier()
        if self.trainer.is_global_zero:
            BatchFile(self.run_folder, "replies").remove()  # the picks say all that is needed now
        if not self.judged:
            return
        training = self.policy.training
        after = self.answers(self.policy.eval())
        distance = self.kl(after)
        self.policy.train(training)
        rows = [
            *zip(self.judged, self.found["held_out_replies"], self.found["held_out_ended"], strict=True),
            *zip(self.judged, after.texts, after.ended.tolist(), strict=True),
        ]
        old, new = self.scores([Candidate(*row, None) for row in rows]).view(2, -1)
        was = reply_metrics(
            rollout_of(self.policy, self.judged, self.found["held_out_replies"], self.found["held_out_ended"]), old
        )
        now = reply_metrics(after, new) | distance
        if "gold" in now:
            now["proxy_gold_gap"] = proxy_gold_gap(now, was)
            count = count_clusters(self.judged)
            error = proxy_gold_gap_error(now, was, count, count)
            now["proxy_gold_gap_se"] = new.new_tensor(error)
        for metrics in (was, now):
            look(self.trainer, self.name, metrics)
        self.gain = {f"val/{name}": float(value) for name, value in now.items()}
        self.gain |= {"val/score_before": float(was["score"]), "val/score_gain": float(now["score"] - was["score"])}

    def prompts_to_show(self) -> list[Prompt]:
        """Held-out prompts."""
        return list(self.data.validation)

    def final_metrics(self) -> dict[str, float]:
        """Best-of-K gain against log K and the KL bound log K - (K-1)/K (nats); what it did on held-out prompts."""
        of_replies = ("samples", "reward_mean", "reward_best", "reward_picked", "earlier_share", "cut_share")
        return {
            **{name: self.found[name] for name in (*of_replies, "gain_per_log_k", "log_law_r2")},
            "best_of_k_gain": self.found["reward_best"] - self.found["reward_mean"],
            "kl_bound": kl_bound(self.found["samples"]),
            **{f"gain_of_best/{k}": gain for k, gain in self.found["gain_by_k"].items() if k != "1"},
            **{
                f"{name}_at/{temperature}": value
                for temperature, values in self.found["temperatures"].items()
                if len(self.found["temperatures"]) > 1
                for name, value in values.items()
            },
            **self.gain,
        }


def keep(file: BatchFile, batch: int, rollout: Rollout) -> None:
    """Writes down what the reward and the fine-tuning read of a rollout."""
    file.add(batch, texts=rollout.texts, ended=rollout.ended.tolist())
