"""Rejection sampling fine-tuning (Llama 2, section 3.2.3): K replies per prompt, the best becomes a demonstration."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from rlhf.best_of_k import expected_best, kl_bound, log_law, rollout_of
from rlhf.data.data import Split
from rlhf.data.records import Demonstration, Message, Prompt
from rlhf.diagnostics import look, proxy_gold_gap, reply_metrics
from rlhf.errors import UserError
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.language_model import LanguageModel
from rlhf.models.precision import Precision
from rlhf.objective import TokenObjective
from rlhf.progress import Meter
from rlhf.report import diagnostics
from rlhf.rollout import Rollout, Sampler
from rlhf.scoring import Reward, make_ready
from rlhf.stage import Optimizer, Schedule, seed_of
from rlhf.supervised import Supervised

Selection = Literal["best_per_prompt", "top_overall", "random_per_prompt", "random_overall"]
JUDGED = 400  # held-out prompts on which the result is scored; the standard error is then 1/20 of the spread


@dataclass
class Candidate:
    """A reply that may be picked."""

    prompt: Prompt
    reply: str
    ended: bool
    temperature: float | None  # None: a pick of an earlier round
    score: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            **self.prompt.to_json(),
            "reply": self.reply,
            "ended": self.ended,
            "score": self.score,
            "temperature": self.temperature,
        }


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
        sampler: Model that answers the prompts; null: the one that is trained, as it starts.
        earlier: Runs (or files) whose picks stand for choice beside the new replies, scored by this run's reward.
        keep_earlier: Whether they do.
    """

    headline = "val/score_gain"

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
        sampler: str | None = None,
        earlier: str | list[str] | None = None,
        keep_earlier: bool = True,
    ) -> None:
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
        if rollout.samples < 2:
            raise UserError(f"rollout.samples={rollout.samples}: the best of one is no choice; type rollout.samples=4")
        self.reward, self.rollout, self.select, self.sampler = reward, rollout, select, sampler
        sources = [earlier] if isinstance(earlier, str) else list(earlier or ())
        self.earlier = [candidate for source in sources for candidate in read_picks(source)] if keep_earlier else []
        self.gain: dict[str, float] = {}

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
        make_ready(self.reward, self.device, [*self.data.train, *self.judged], self.rollout.max_new_tokens)
        if not self.picks_file.exists():
            self.trainer.strategy.barrier()
            if self.trainer.is_global_zero:
                self.sample_and_pick()
            self.trainer.strategy.barrier()
        self.read_examples()

    def read_examples(self) -> None:
        """Tokenises the picks."""
        if not self.picks_file.exists():
            raise UserError(
                f"stage={self.name} trains on picks among replies that have not been sampled yet ({self.run_folder} "
                "has none): run it first; rlhf inspect data shows its prompts"
            )
        self.found = json.loads(self.best_of_k_file.read_text(encoding="utf-8"))
        candidates = read_picks(str(self.picks_file))
        picks = [
            Demonstration((*candidate.prompt.messages, Message("assistant", candidate.reply)))
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

    def sampling_policy(self) -> LanguageModel:
        """Who answers the prompts: another model, as it is, or the one that will be trained."""
        if self.sampler is None:
            return self.policy
        spec = CausalLM(path=self.sampler, architecture=None, vocab_size=None)
        if spec.folder == getattr(self.policy.base.config, "_name_or_path", None):
            return self.policy  # the same weights, and an adapter that is fresh changes nothing
        precision = Precision("bf16-true" if self.trainer.precision == "bf16-true" else "32-true")
        return spec.load(NoAdapter(), precision).frozen().to(self.device)

    @torch.no_grad()
    def sample_and_pick(self) -> None:
        """K replies to each training prompt and the earlier picks, scored; writes the picks."""
        policy = self.sampling_policy().eval()
        prompts = self.asked
        candidates: list[Candidate] = []
        spread = getattr(self.rollout, "spread", [self.rollout.temperature] * self.rollout.samples)
        with Meter(f"{self.name}: sampling", len(prompts), "prompt") as meter:
            for start in range(0, len(prompts), self.batch_size):
                batch = prompts[start : start + self.batch_size]
                rollout = self.rollout.sample(policy, batch, seed_of(self.seed, "sample", start))
                candidates += [
                    Candidate(prompt, text, ended, spread[row % len(spread)])
                    for row, (prompt, text, ended) in enumerate(
                        zip(rollout.prompts, rollout.texts, rollout.ended.tolist(), strict=True)
                    )
                ]
                meter.advance(len(batch))
        judged = self.answers(policy)
        del policy
        fresh = len(candidates)
        candidates += [Candidate(c.prompt, c.reply, c.ended, None) for c in self.earlier]
        scores = self.scores(candidates)
        for candidate, score in zip(candidates, scores.tolist(), strict=True):
            candidate.score = score
        picks = self.pick(candidates, len(prompts))
        self.write(scores[:fresh].view(len(prompts), -1), spread, picks, judged)
        self.policy.train()

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

    def pick(self, candidates: list[Candidate], count: int) -> list[Candidate]:
        """The picks, in the order of the prompts."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, "pick"))
        places: dict[str, int] = {}
        for candidate in candidates:
            places.setdefault(key_of(candidate.prompt), len(places))
        if self.select.endswith("_per_prompt"):
            groups: list[list[Candidate]] = [[] for _ in places]
            for candidate in candidates:
                groups[places[key_of(candidate.prompt)]].append(candidate)
            if self.select == "best_per_prompt":
                return [max(group, key=lambda candidate: candidate.score) for group in groups]
            draws = torch.rand(len(groups), generator=generator).tolist()
            return [group[int(draw * len(group))] for draw, group in zip(draws, groups, strict=True)]
        # The same reply to the same prompt counts once, or the easiest prompts would fill the list.
        distinct = list({(key_of(c.prompt), c.reply): c for c in reversed(candidates)}.values())[::-1]
        if self.select == "top_overall":
            chosen = sorted(distinct, key=lambda candidate: -candidate.score)[:count]
        else:
            chosen = [distinct[row] for row in torch.randperm(len(distinct), generator=generator)[:count].tolist()]
        return sorted(chosen, key=lambda candidate: places[key_of(candidate.prompt)])

    def write(self, scores: torch.Tensor, spread: list[float], picks: list[Candidate], judged: Rollout | None) -> None:
        """``best_of_k.json`` and its plot, then ``picks.jsonl``: whole or not there."""
        best = expected_best(scores)
        gains = {k: value - best[1] for k, value in best.items()}
        slope, explained = log_law(gains)
        winners = scores.argmax(dim=1).tolist()
        temperatures = {
            f"{value:g}": {
                "reward_mean": scores[:, [k for k, t in enumerate(spread) if t == value]].mean().item(),
                "share_of_best": sum(spread[k] == value for k in winners) / len(winners),
            }
            for value in dict.fromkeys(spread)
        }
        content = {
            "samples": scores.shape[1],
            "prompts": len(scores),
            "reward_mean": best[1],
            "reward_best": best[scores.shape[1]],
            "reward_picked": sum(candidate.score for candidate in picks) / len(picks),
            "earlier_share": sum(candidate.temperature is None for candidate in picks) / len(picks),
            "gain_by_k": {str(k): gain for k, gain in gains.items()},
            "kl_bound_by_k": {str(k): kl_bound(k) for k in gains},
            "gain_per_log_k": slope,
            "log_law_r2": explained,
            "temperatures": temperatures,
            "held_out_replies": [] if judged is None else judged.texts,
            "held_out_ended": [] if judged is None else judged.ended.tolist(),
        }
        diagnostics.best_of_k(gains, slope, self.run_folder / "best_of_k.png")
        self.best_of_k_file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary = self.picks_file.with_name(".picks.jsonl")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(candidate.to_json(), ensure_ascii=False) + "\n" for candidate in picks)
        temporary.rename(self.picks_file)

    # -- what it was worth ----------------------------------------------------------------------------------------

    def answers(self, policy: LanguageModel) -> Rollout | None:
        """One reply to each held-out prompt at temperature 1; the same noise before and after training."""
        if not self.judged:
            return None
        sampler = Sampler(self.rollout.max_new_tokens)
        return sampler.sample(policy, self.judged, seed_of(self.seed, "judge"))

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Scores the trained policy on held-out prompts, beside the one that sampled."""
        if not self.judged:
            return
        training = self.policy.training
        after = self.answers(self.policy.eval())
        self.policy.train(training)
        assert after is not None
        rows = [
            *zip(self.judged, self.found["held_out_replies"], self.found["held_out_ended"], strict=True),
            *zip(self.judged, after.texts, after.ended.tolist(), strict=True),
        ]
        old, new = self.scores([Candidate(*row, None) for row in rows]).view(2, -1)
        was = reply_metrics(
            rollout_of(self.policy, self.judged, self.found["held_out_replies"], self.found["held_out_ended"]), old
        )
        now = reply_metrics(after, new)
        if "gold" in now:
            now["proxy_gold_gap"] = proxy_gold_gap(now, was)
        for metrics in (was, now):
            look(self.trainer, self.name, metrics)
        self.gain = {f"val/{name}": float(value) for name, value in now.items()}
        self.gain |= {"val/score_before": float(was["score"]), "val/score_gain": float(now["score"] - was["score"])}

    def prompts_to_show(self) -> list[Prompt]:
        """Held-out prompts."""
        return list(self.data.validation)

    def final_metrics(self) -> dict[str, float]:
        """Best-of-K gain against log K and the KL bound log K - (K-1)/K (nats); what it did on held-out prompts."""
        of_replies = ("samples", "reward_mean", "reward_best", "reward_picked", "earlier_share")
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


def key_of(prompt: Prompt) -> str:
    """What makes two prompts the same: what is asked."""
    return "\x1f".join(f"{message.role}:{message.content}" for message in prompt.messages)


def read_picks(source: str) -> list[Candidate]:
    """The picks of a run, or of a picks.jsonl. Raises UserError where there are none."""
    path = Path(source)
    path = path / "picks.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"inputs.picks={source}: no picks.jsonl there; name a run of stage=rejection_sampling")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            raw = json.loads(line)
            found.append(
                Candidate(Prompt.from_json(raw), raw["reply"], bool(raw.get("ended", True)), raw.get("temperature"))
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"inputs.picks={source}: line {number} is no pick ({error!r})") from error
    return found
