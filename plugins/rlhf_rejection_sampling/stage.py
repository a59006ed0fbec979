"""Rejection sampling fine-tuning (Llama 2, section 3.2.3): K replies per prompt, the best becomes a demonstration."""

import json
import math
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlhf.data.data import Split
from rlhf.data.records import Demonstration, Message, Prompt, messages_from_json
from rlhf.errors import UserError
from rlhf.models.language_model import LanguageModel
from rlhf.objective import TokenObjective
from rlhf.progress import Meter
from rlhf.rollout import Sampler
from rlhf.scoring import Reward
from rlhf.stage import Optimizer, Schedule, seed_of
from rlhf.supervised import Supervised


class RejectionSamplingStage(Supervised):
    """Samples with the policy as it starts, then fine-tunes it on the picks with the loss of SFT.

    Args:
        batch_size: Picks per update, and prompts answered at a time.
        micro_batch_size: Rows per forward pass, null: all.
        gradient_clip: Largest gradient norm, null: none.
        epochs: Times each pick is seen.
        packing: Tokens in a row of several dialogues; null: one dialogue a row, padded.
        select: "best" of the K by reward; "random" is the matched control: same prompts, same K, no reward.
    """

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
        batch_size: Annotated[int, Field(gt=0)] = 64,
        micro_batch_size: Annotated[int, Field(gt=0)] | None = None,
        gradient_clip: Annotated[float, Field(gt=0)] | None = 1.0,
        epochs: Annotated[float, Field(gt=0)] = 2,
        packing: Annotated[int, Field(gt=1)] | None = None,
        select: Literal["best", "random"] = "best",
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
        self.reward, self.rollout, self.select = reward, rollout, select

    @property
    def picks_file(self) -> Path:
        """The picks: one JSON line a prompt, whole or not there."""
        return self.run_folder / "picks.jsonl"

    def prepare(self) -> None:
        """Samples, picks, tokenises."""
        if hasattr(self.reward, "to"):
            self.reward.to(self.device)
        if not self.picks_file.exists():
            self.trainer.strategy.barrier()
            if self.trainer.is_global_zero:
                self.sample_and_pick()
            self.trainer.strategy.barrier()
        rows = [json.loads(line) for line in self.picks_file.read_text(encoding="utf-8").splitlines()]
        self.gains = {name: sum(row[name] for row in rows) / len(rows) for name in ("best", "mean", "picked")}
        picks = [
            Demonstration((*messages_from_json(row["prompt"]), Message("assistant", row["reply"])))
            for row in rows
            if row["reply"]  # an empty pick teaches nothing
        ]
        encoded, report = self.data.data.encode(self.policy.tokenizer, picks)
        self.note(f"{len(rows)} picks: {report}, {len(rows) - len(picks)} empty")
        held_out = max(1, len(encoded) // 20)
        self.examples, self.held_out = encoded[held_out:], encoded[:held_out]
        self.arrange()

    @torch.no_grad()
    def sample_and_pick(self) -> None:
        """K replies to each training prompt; writes the pick of each."""
        temporary = self.picks_file.with_name(".picks.jsonl")
        self.policy.eval()
        prompts: list[Prompt] = list(self.data.train)
        with (
            temporary.open("w", encoding="utf-8") as file,
            Meter(f"{self.name}: sampling", len(prompts), "prompt") as meter,
        ):
            for start in range(0, len(prompts), self.batch_size):
                batch = prompts[start : start + self.batch_size]
                seed = seed_of(self.seed, "sample", start)
                rollout = self.rollout.sample(self.policy, batch, seed)
                scores = self.reward(rollout).view(len(batch), -1)
                picks = self.pick(scores, seed)
                for row, prompt in enumerate(batch):
                    index = int(picks[row])
                    record = {
                        "prompt": [message.to_json() for message in prompt.messages],
                        "reply": rollout.texts[row * scores.shape[1] + index],
                        "picked": scores[row, index].item(),
                        "best": scores[row].max().item(),
                        "mean": scores[row].mean().item(),
                    }
                    file.write(json.dumps(record) + "\n")
                meter.advance(len(batch), best=scores.amax(1).mean().item(), mean=scores.mean().item())
        self.policy.train()
        temporary.rename(self.picks_file)

    def pick(self, scores: Tensor, seed: int) -> Tensor:
        """Index of the picked reply of each prompt, [N, K] -> [N]."""
        if self.select == "best":
            return scores.argmax(dim=1)
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(scores.shape[1], (len(scores),), generator=generator).to(scores.device)

    def prompts_to_show(self) -> list[Prompt]:
        """Held-out prompts."""
        return list(self.data.validation)

    def final_metrics(self) -> dict[str, float]:
        """Best-of-K gain, and the bound log K - (K-1)/K on how far picking moves the policy (in nats)."""
        k = self.rollout.samples
        return {
            "samples": k,
            "reward_mean": self.gains["mean"],
            "reward_best": self.gains["best"],
            "reward_picked": self.gains["picked"],
            "best_of_k_gain": self.gains["best"] - self.gains["mean"],
            "kl_bound": math.log(k) - (k - 1) / k,
        }
