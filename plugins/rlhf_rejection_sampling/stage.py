"""Rejection sampling fine-tuning (Llama 2, section 3.2.3): K responses per prompt, the best becomes a demonstration."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from rlhf.callbacks.progress import work_of
from rlhf.callbacks.reward_hacking import count_clusters, look, proxy_gold_gap, proxy_gold_gap_error, response_metrics
from rlhf.data.records import Demonstration, Message, Prompt
from rlhf.data.split import Split
from rlhf.errors import UserError, key
from rlhf.functional.advantages import sequence_kl
from rlhf.functional.best_of_n import kl_bound
from rlhf.functional.scores import missing_eos
from rlhf.models.adapters import NoAdapter
from rlhf.models.auxiliary_models import copy_start_if_needed, restore_start
from rlhf.models.causal_lm import CausalLM
from rlhf.models.language_model import LanguageModel
from rlhf.models.precision import Precision
from rlhf.models.reference import Reference
from rlhf.objective import TokenObjective
from rlhf.reward.base import Reward, make_ready
from rlhf.reward.missing_eos import MISSING_EOS_PENALTY, MissingEOSOption, resolve_missing_eos
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.base import Sampler
from rlhf.sampler.best_of_k import build_rollout
from rlhf.sampler.rollout import Rollout
from rlhf.stage import figures
from rlhf.stage.batch_order import derive_seed
from rlhf.stage.experience import response_logprobs
from rlhf.stage.supervised import Supervised
from rlhf.stage.update import Optimizer, Schedule
from rlhf.storage.batch_file import BatchFile
from rlhf.storage.files import write_text
from rlhf_rejection_sampling.selection import (
    Candidate,
    Selection,
    best_of_k_statistics,
    read_selected,
    select_responses,
    write_selected,
)

EVALUATED = 400  # held-out prompts on which the result is scored; the standard error is then 1/20 of the deviation
HELD_OUT = -1  # batch number of the held-out prompts among those of training prompts


class RejectionSamplingStage(Supervised):
    """Stage that selects among K responses of a policy by a reward, then fine-tunes on them with the loss of SFT.

    Args:
        hyperparameters: Those of ``Supervised``: ``batch_size`` is in selected responses per update, and in prompts
            per sampling batch.
        select: "best_per_prompt" is the best response to each of the N prompts; "top_overall" the N best distinct
            responses of all. "random_per_prompt" and "random_overall" are their controls: as many responses,
            without the reward.
        missing_eos: How the score of a candidate without EOS changes before the selection; as ``RolloutStage``.
        missing_eos_penalty: Missing-EOS penalty, in units of the reward.
        sampling_model: Model that generates the responses; null: the model that is trained, before training.
        earlier: Runs (or files) whose selected responses are candidates beside the new ones, scored by this run's
            reward.
        keep_earlier: Whether ``earlier`` is used.
    """

    reads: ClassVar[dict[str, tuple[str, ...]]] = {"data": ("prompt",)}
    headline = "val/score_gain"
    auxiliary_models = {"sampling_model": False}
    defaults: ClassVar[Mapping[str, Any]] = {"batch_size": 32, "epochs": 2}

    def __init__(
        self,
        model: LanguageModel,
        objective: TokenObjective,
        data: Split,
        reward: Reward,
        sampler: Sampler,
        optimizer: Optimizer,
        scheduler: Schedule,
        *,
        select: Selection = "best_per_prompt",
        missing_eos: MissingEOSOption = "auto",
        missing_eos_penalty: Annotated[float, Field(ge=0)] = MISSING_EOS_PENALTY,
        sampling_model: str | None = None,
        earlier: str | list[str] | None = None,
        keep_earlier: bool = True,
        **hyperparameters: Any,
    ) -> None:
        self.check_parts(sampler=sampler)
        super().__init__(model, objective, data, optimizer, scheduler, **hyperparameters)
        self.reward, self.sampler, self.select, self.sampling_model = reward, sampler, select, sampling_model
        self.missing_eos = resolve_missing_eos(missing_eos, missing_eos_penalty, reward)
        self.missing_eos_penalty = missing_eos_penalty
        sources = [earlier] if isinstance(earlier, str) else list(earlier or ())
        self.earlier = [candidate for source in sources for candidate in read_selected(source)] if keep_earlier else []
        self.start = copy_start_if_needed(model) if self.is_on_policy else None
        self.gain: dict[str, float] = {}

    @classmethod
    def check_parts(cls, *, sampler: Sampler | None = None, **parts: Any) -> None:
        """Validate as ``Stage.check_parts``; also the sampler: 2 or more samples per prompt, single turns."""
        super().check_parts(**parts)
        if sampler is None:
            return
        if sampler.samples < 2:
            raise UserError(
                "best-of-K needs at least 2 samples",
                fix=f"type {key('sampler.samples', 4)}",
                option="sampler.samples",
                value=sampler.samples,
            )
        sampler.require_single_turn("a selected response is a single turn")

    # -- sampling and selection -----------------------------------------------------------------------------------

    @property
    def selected_file(self) -> Path:
        """File of the selected responses, JSON lines; complete or absent."""
        return self.run_directory / "selected_responses.jsonl"

    @property
    def best_of_k_file(self) -> Path:
        """File of the best-of-k statistics and the sampling model's responses to held-out prompts."""
        return self.run_directory / "best_of_k.json"

    def prepare(self) -> None:
        """Sample responses, select among them, tokenize the selected ones."""
        self.data = self.fit_prompts(self.data, self.sampler, held_out_sampled=EVALUATED)
        make_ready(self.reward, self.device, [*self.data.train, *self.evaluated_prompts], self.sampler.max_new_tokens)
        if not self.best_of_k_file.exists():  # written last; if absent, only missing batches are sampled
            self.trainer.strategy.barrier()
            responses = self.sample()
            self.trainer.strategy.barrier()
            if self.trainer.is_global_zero:
                self.write_selection(responses.read())
            self.trainer.strategy.barrier()
        self.policy.train()
        self.read_examples()

    def read_examples(self) -> None:
        """Tokenize the selected responses and build the batch sampler."""
        if not self.best_of_k_file.exists():
            raise UserError(
                f"{self.name} trains on selected responses, and {self.run_directory} has none yet",
                fix="run it first; `rlhf inspect data` shows its prompts",
            )
        self.found = json.loads(self.best_of_k_file.read_text(encoding="utf-8"))
        candidates = read_selected(str(self.selected_file))
        selected = [
            Demonstration((*candidate.prompt.messages, Message("assistant", candidate.response)), candidate.ended)
            for candidate in candidates
            if candidate.response  # an empty response holds nothing to train on
        ]
        encoded, report = self.data.data.encode(self.policy.tokenizer, selected)
        self.note(
            f"{len(candidates)} selected responses: {report}, {len(candidates) - len(selected)} empty, "
            f"{sum(candidate.temperature is None for candidate in candidates)} of earlier rounds"
        )
        held_out = max(1, len(encoded) // 20)
        self.examples, self.held_out = encoded[held_out:], encoded[:held_out]
        if not self.examples:
            raise UserError(
                f"{len(encoded)} selected responses are too few to train on", fix=f"type a larger {key('data.size')}"
            )
        self.pack_and_batch()

    @property
    def evaluated_prompts(self) -> list[Prompt]:
        """Held-out prompts on which the trained policy is scored."""
        return list(self.data.validation[:EVALUATED])

    @property
    def training_prompts(self) -> list[Prompt]:
        """Training prompts; if batches are limited, only as many as can be trained on."""
        limit = self.trainer.limit_train_batches
        prompts = list(self.data.train)
        return prompts[: (int(limit) + 1) * self.batch_size] if isinstance(limit, int) else prompts

    @property
    def is_on_policy(self) -> bool:
        """Return whether the sampling model is the trained policy: equal weights, as a fresh adapter adds nothing."""
        return self.sampling_model is None or CausalLM(self.sampling_model, None, None).folder == self.policy.origin

    def sampling_policy(self) -> LanguageModel:
        """Return the model that generates the responses: another model, frozen, or the policy before training."""
        if self.sampling_model is None or self.is_on_policy:
            return self.policy
        spec = CausalLM(path=self.sampling_model, architecture=None, vocab_size=None)
        if self.policy.shared is not None:
            return self.policy.shared.language_model(self.sampling_model).to(self.device)
        precision = Precision("bf16-true" if self.trainer.precision == "bf16-true" else "32-true")
        return spec.load(NoAdapter(), precision).frozen().to(self.device)

    def sampling_reference(self) -> Reference:
        """Return the model that generated the responses, after the policy has been trained."""
        if self.is_on_policy:
            return restore_start(self.policy, self.start)
        return Reference(self.sampling_policy(), shared=self.policy.shared is not None)

    def sample(self) -> BatchFile:
        """Sample K responses to each training prompt and one to each held-out one, batch by batch, on all ranks.

        Batches that an earlier attempt has finished are not sampled again.
        """
        trainer, prompts = self.trainer, self.training_prompts
        file = BatchFile(self.run_directory, "responses", trainer.global_rank, trainer.world_size)
        batches = [prompts[start : start + self.batch_size] for start in range(0, len(prompts), self.batch_size)]
        todo = list(file.mine(len(batches)))
        held_out = self.evaluated_prompts and trainer.is_global_zero and HELD_OUT not in file.done
        if not todo and not held_out:
            return file
        policy = self.sampling_policy().eval()
        total = -(-len(batches) // trainer.world_size)
        with work_of(self, "sampling", total, "batch", start=total - len(todo), always=True) as meter:
            for index in todo:
                seed = derive_seed(self.seed, "sample", index * self.batch_size)
                write_responses(file, index, self.sampler.sample(policy, batches[index], seed))
                meter.advance()
        if held_out:
            write_responses(file, HELD_OUT, self.sample_held_out(policy))
        return file

    @torch.no_grad()
    def write_selection(self, responses: dict[int, dict[str, Any]]) -> None:
        """Score new and earlier responses, select among them, and write the selected ones and best-of-k statistics.

        Args:
            responses: The sampled responses, by batch.
        """
        held_out = responses.pop(HELD_OUT, {"texts": [], "ended": []})
        prompts, spread = self.training_prompts, self.sampler.spread
        rows = [row for batch in responses.values() for row in zip(batch["texts"], batch["ended"], strict=True)]
        candidates = [
            Candidate(prompts[index // len(spread)], text, ended, spread[index % len(spread)])
            for index, (text, ended) in enumerate(rows)
        ]
        candidates += [Candidate(c.prompt, c.response, c.ended, None) for c in self.earlier]
        ended = torch.tensor([candidate.ended for candidate in candidates])
        scores = missing_eos(self.scores(candidates).cpu(), ended, self.missing_eos_penalty, self.missing_eos)
        for candidate, score in zip(candidates, scores.tolist(), strict=True):
            candidate.score = score
        selected = select_responses(candidates, self.select, len(prompts), derive_seed(self.seed, "pick"))
        content = best_of_k_statistics(scores[: len(rows)].view(len(prompts), -1), spread, selected)
        gains = {int(k): gain for k, gain in content["gain_by_k"].items()}
        figures.plot_best_of_k(gains, content["gain_per_log_k"], self.run_directory / "best_of_k.png")
        write_selected(self.selected_file, selected)
        content |= {"held_out_responses": held_out["texts"], "held_out_ended": held_out["ended"]}
        write_text(self.best_of_k_file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def scores(self, candidates: Sequence[Candidate]) -> torch.Tensor:
        """Return the reward of all candidates, [C], in one call, so that all have one scale."""
        return self.reward(
            build_rollout(
                self.policy,
                [candidate.prompt for candidate in candidates],
                [candidate.response for candidate in candidates],
                [candidate.ended for candidate in candidates],
            )
        ).float()

    # -- evaluation -----------------------------------------------------------------------------------------------

    def sample_held_out(self, policy: LanguageModel) -> Rollout:
        """Sample one response per held-out prompt at temperature 1, with the same noise before and after training."""
        return self.evaluation_sampler.sample(policy, self.evaluated_prompts, derive_seed(self.seed, "judge"))

    @property
    def evaluation_sampler(self) -> Sampler:
        """Sampler for held-out prompts."""
        return AncestralSampler(self.sampler.max_new_tokens)

    def kl(self, rollout: Rollout) -> dict[str, torch.Tensor]:
        """Return KL(policy || sampling model) in nats per response, by k1 and by k3; empty if vocabularies differ.

        Measured on the policy's own responses, without top-k or top-p and at the temperature of ``evaluation_sampler``,
        so that k1 is unbiased.
        """
        other = self.sampling_reference()
        if other.modules[0].tokenizer.get_vocab() != self.policy.tokenizer.get_vocab():
            self.note(
                f"stage.sampling_model={self.sampling_model} has another vocabulary than the policy: val/kl is not "
                "measured"
            )
            return {}
        size = self.micro_batch_size or self.batch_size
        logp, ref_logp = response_logprobs(self.policy, other, rollout, self.evaluation_sampler.temperature, size)
        return {
            "kl": sequence_kl(logp, ref_logp, rollout.mask).mean(),
            "kl_k3": sequence_kl(logp, ref_logp, rollout.mask, "k3").mean(),
        }

    def finish(self) -> None:
        """Score the trained policy on held-out prompts, beside the sampling model."""
        self.trainer.strategy.barrier()
        if self.trainer.is_global_zero:
            BatchFile(self.run_directory, "responses").remove()  # the selected responses replace it
        if not self.evaluated_prompts:
            return
        training = self.policy.training
        after = self.sample_held_out(self.policy.eval())
        distance = self.kl(after)
        self.policy.train(training)
        prompts = self.evaluated_prompts
        texts, ended = self.found["held_out_responses"], self.found["held_out_ended"]
        rows = [
            *zip(prompts, texts, ended, strict=True),
            *zip(prompts, after.texts, after.ended.tolist(), strict=True),
        ]
        old, new = self.scores([Candidate(*row, None) for row in rows]).view(2, -1)
        was = response_metrics(build_rollout(self.policy, prompts, texts, ended), old)
        now = response_metrics(after, new) | distance
        if "gold" in now:
            now["proxy_gold_gap"] = proxy_gold_gap(now, was)
            count = count_clusters(prompts)
            error = proxy_gold_gap_error(now, was, count, count)
            now["proxy_gold_gap_se"] = new.new_tensor(error)
        for metrics in (was, now):
            look(self.trainer, self.name, metrics)
        self.gain = {f"val/{name}": float(value) for name, value in now.items()}
        self.gain |= {"val/score_before": float(was["score"]), "val/score_gain": float(now["score"] - was["score"])}

    def prompts_to_show(self) -> list[Prompt]:
        """Return the held-out prompts."""
        return list(self.data.validation)

    def final_metrics(self) -> dict[str, float]:
        """Return best-of-K gain against log K, KL bound log K - (K-1)/K (nats), and results on held-out prompts."""
        of_responses = ("samples", "reward_mean", "reward_best", "reward_selected", "earlier_share", "cut_share")
        return {
            **{name: self.found[name] for name in (*of_responses, "gain_per_log_k", "log_law_r2")},
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


def write_responses(file: BatchFile, batch: int, rollout: Rollout) -> None:
    """Write the texts and ended flags of a rollout, which the reward and the fine-tuning read."""
    file.add(batch, texts=rollout.texts, ended=rollout.ended.tolist())
