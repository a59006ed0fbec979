"""Benchmark cases: shapes, models, and the amounts of work that their algorithms need."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.flops import Shape, Work, forward_flops, row_work, training_flops, tree_work

PPO_EPOCHS = 1  # passes over a rollout, each one minibatch; InstructGPT, Llama 2


@dataclass(frozen=True)
class Case:
    """One comparison with a peer.

    Attributes:
        name: Name on the command line.
        family: Module of this package that runs it.
        stage: Our stage; "sampling" for the sampler alone.
        peer: Library that it is compared with.
        model: Default model, of ``models.SIZES`` or ``smollm2``.
        batch: Rows, pairs or prompts in an optimizer step.
        length: Most tokens in a row, for cases on given rows.
        prompt: Most tokens in a prompt, for cases that sample.
        response: New tokens of a response, for cases that sample.
        samples: Responses to each prompt.
        lora: Rank of LoRA adapters on all linear layers; None: all weights are trained.
        cached_reference: Whether the peer computes reference log-probabilities once, too, before training.
    """

    name: str
    family: str
    stage: str
    peer: str = "trl 1.16"
    model: str = "12m"
    batch: int = 8
    length: int = 512
    prompt: int = 192
    response: int = 64
    samples: int = 1
    lora: int | None = None
    cached_reference: bool = False

    @property
    def samples_responses(self) -> bool:
        """Return whether the case samples responses rather than reading given rows."""
        return self.stage in ("ppo", "grpo", "rloo", "sampling")

    @property
    def rows_of(self) -> str:
        """Kind of the rows: dialogues, pairs or prompts."""
        return "prompts" if self.samples_responses else "dialogues" if self.stage == "sft" else "pairs"

    def fitted(self, context: int) -> "Case":
        """Return the case with lengths that fit a model's context."""
        if max(self.length, self.prompt + self.response) <= context:
            return self
        share = context / max(self.length, self.prompt + self.response)
        return replace(
            self,
            length=max(8, int(self.length * share)),
            prompt=max(8, int(self.prompt * share)),
            response=max(2, int(self.response * share)),
        )


CASES = {
    case.name: case
    for case in (
        Case("sft", "supervised", "sft"),
        Case("reward_model", "preferences", "reward_model"),
        Case("dpo", "preferences", "dpo"),
        Case("dpo_cached", "preferences", "dpo", cached_reference=True),
        Case("grpo", "groups", "grpo", batch=4, samples=8),
        Case("rloo", "groups", "rloo", batch=4, samples=8),
        Case("ppo", "ppo", "ppo", peer="trl 0.24"),
        Case("sampling", "sampling", "sampling", peer="transformers", batch=1, samples=8),
        Case("sft_135m", "supervised", "sft", model="135m", batch=4),
        Case("dpo_lora", "preferences", "dpo", model="135m", batch=4, lora=16),
    )
}


@dataclass(frozen=True)
class Amounts:
    """Work of one optimizer step (of one call, for sampling)."""

    flops: int  # that the algorithm needs
    tokens: int  # tokens of prompts and responses, a prompt counted with each of its responses; no padding
    samples: int  # rows, pairs or responses


def count_amounts(case: Case, shape: Shape, rows: Sequence[dict[str, Any]], response: float | None = None) -> Amounts:
    """Return the work of one step on these rows.

    Args:
        case: The case.
        shape: Sizes of the model.
        rows: Rows of ``rows.build_rows``.
        response: Mean length of the sampled responses, where a worker measured it; None: the longest.
    """
    if case.stage == "sft":
        work = sum((row_work(len(row["ids"]), sum(row["mask"])) for row in rows), Work())
        return Amounts(training_flops(shape, work, case.lora), work.tokens, len(rows))
    if not case.samples_responses:
        trees = [(len(row["prompt"]), (len(row["chosen"]), len(row["rejected"]))) for row in rows]
        work = sum((tree_work(*tree) for tree in trees), Work())
        if case.stage == "reward_model":
            work = work.without_targets()
        tokens = sum(2 * prompt + sum(responses) for prompt, responses in trees)
        return Amounts(training_flops(shape, work, case.lora), tokens, len(rows))
    length = case.response if response is None else round(response)
    work = sum((tree_work(len(row["ids"]), [length] * case.samples) for row in rows), Work())
    tokens = case.samples * sum(len(row["ids"]) + length for row in rows)
    return Amounts(_rollout_flops(case, shape, work), tokens, case.samples * len(rows))


def _rollout_flops(case: Case, shape: Shape, work: Work) -> int:
    """Return the FLOPs of a step that samples; the sampler's log-probabilities are those of the old policy."""
    sampling = forward_flops(shape, work)
    if case.stage == "sampling":
        return sampling
    reference = forward_flops(shape, work)
    update = training_flops(shape, work, case.lora)
    if case.stage != "ppo":
        return sampling + reference + update
    scalar = work.without_targets()
    scores = 2 * forward_flops(shape, scalar)  # the reward model's and the critic's
    return sampling + reference + scores + PPO_EPOCHS * (update + training_flops(shape, scalar, case.lora))
