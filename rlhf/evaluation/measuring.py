"""Metrics of several policies on the same prompts and random numbers, so that their differences are paired.

Each metric of a policy is a list of numbers, one per prompt (or document), whose mean is the metric. Errors and paired
differences of all metrics follow from these lists in one way (`rlhf.functional.statistics`).
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from rlhf.callbacks.progress import Meter
from rlhf.data.records import Demonstration, Prompt, Text, cluster_key
from rlhf.evaluation.compare import load_policy, sequence_logprobs
from rlhf.evaluation.perplexity import Likelihood, response_likelihood, text_likelihood
from rlhf.models.language_model import LanguageModel
from rlhf.reward.base import Reward
from rlhf.sampler.generation import SeededSampler, generate_batches, room
from rlhf.sampler.rollout import Rollout


@dataclass(frozen=True)
class Task:
    """Prompts, documents and sampling settings that every policy is measured with.

    Args:
        prompts: The prompts.
        texts, dialogues: Documents whose perplexity is measured.
        max_new_tokens: Longest response. A prompt that leaves a policy less context is refused.
        temperature: Of the sampling, and of the log-probabilities in the KL; at 0 there is no KL.
        seed: Seed of the sampling.
        batch_size: Rows sampled or scored at a time.
        best_of: Responses to each prompt that are sampled besides, for the best of n; 0: none.
    """

    prompts: list[Prompt]
    texts: list[Text] = field(default_factory=list)
    dialogues: list[Demonstration] = field(default_factory=list)
    max_new_tokens: int = 32
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 64
    best_of: int = 0


@dataclass
class Measured:
    """Responses of one policy, and its metrics so far.

    `values` maps a metric to one number per prompt or document; `notes` are remarks for readers of the numbers.
    """

    name: str
    path: str
    rollouts: list[Rollout]
    logp: list[Tensor]  # log-probabilities of each rollout's responses, [B] float32; empty at temperature 0
    vocabulary: dict[str, int]
    values: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    #: metric -> clusters of its values, where these are not one per prompt
    other_clusters: dict[str, list[Hashable]] = field(default_factory=dict)
    many: list[Rollout] = field(default_factory=list)  # `Task.best_of` responses to each prompt

    def clusters(self, metric: str) -> list[Hashable]:
        """Return the cluster of each value of a metric, for its standard error; values of one cluster ask the same."""
        if metric in self.other_clusters:
            return self.other_clusters[metric]
        return [cluster_key(prompt) for rollout in self.rollouts for prompt in rollout.prompts]

    @property
    def texts(self) -> list[str]:
        """Responses, in the order of the prompts."""
        return [text for rollout in self.rollouts for text in rollout.texts]

    def score(self, reward: Reward) -> list[float]:
        """Return a reward's scores of the responses."""
        return self.each("scoring", lambda rollout, _: reward(on(rollout, device())).float().tolist())

    def each(self, doing: str, values: Callable[[Rollout, int], list[float]]) -> list[float]:
        """Return one value per response, computed rollout by rollout; shows the progress.

        Args:
            doing: Name of the work, for the progress line.
            values: Called with a rollout and its index, returns the values of its responses.
        """
        found: list[float] = []
        with Meter(f"{self.name}: {doing}", len(self.texts), "response") as meter:
            for index, rollout in enumerate(self.rollouts):
                found += values(rollout, index)
                meter.update(len(found))
        return found


@torch.no_grad()
def measure(name: str, path: str, task: Task, chat_template: str | None = None) -> Measured:
    """Sample a policy's responses and compute the metrics of the policy alone: length, ended share, perplexities.

    Args:
        name: Name of the policy, for the progress line.
        path: Model directory, run directory, GGUF file or hub id.
        task: Prompts, documents and sampling settings.
        chat_template: Template for a policy without its own.
    """
    policy = load_policy(path, chat_template)
    longest = room(policy, task.prompts, task.max_new_tokens)
    sampler = SeededSampler(longest, task.temperature, batch_size=task.batch_size)
    rollouts: list[Rollout] = []
    logp: list[Tensor] = []
    with Meter(name, len(task.prompts), "prompt") as meter:
        for rollout in generate_batches(policy, task.prompts, sampler, task.seed):
            if task.temperature > 0:
                logp.append(sequence_logprobs(policy, rollout, task.temperature, task.batch_size))
            rollouts.append(rollout_to_cpu(rollout))
            meter.advance(len(rollout.texts))
    many: list[Rollout] = []
    if task.best_of:
        sampler.samples = task.best_of
        with Meter(f"{name}: best of {task.best_of}", len(task.prompts) * task.best_of, "response") as meter:
            for rollout in generate_batches(policy, task.prompts, sampler, task.seed):
                many.append(rollout_to_cpu(rollout))
                meter.advance(len(rollout.texts))
    found = Measured(name, path, rollouts, logp, policy.tokenizer.get_vocab(), many=many)
    found.values["length"] = [float(n) for rollout in rollouts for n in rollout.lengths.tolist()]
    found.values["ended"] = [float(e) for rollout in rollouts for e in rollout.ended.tolist()]
    if task.texts:
        _add_likelihood(found, "text", text_likelihood(policy, task.texts), task.texts)
    if task.dialogues:
        _add_likelihood(found, "answers", response_likelihood(policy, task.dialogues), task.dialogues)
    return found


def _add_likelihood(
    found: Measured, what: str, likelihood: Likelihood, documents: Sequence[Text | Demonstration]
) -> None:
    found.values[f"perplexity_{what}"] = likelihood.perplexity()
    found.values[f"bits_per_byte_{what}"] = likelihood.bits_per_byte()
    for name in (f"perplexity_{what}", f"bits_per_byte_{what}"):
        found.other_clusters[name] = [cluster_key(document) for document in documents]
    if likelihood.cut:
        found.notes.append(f"{likelihood.cut} dialogues are longer than the context and were truncated at its end")


@torch.no_grad()
def add_kl(found: Sequence[Measured], reference: str, task: Task) -> None:
    """Add KL(policy || reference) per response, in nats, to every policy with the reference's vocabulary.

    The mean of log p - log p_ref over responses drawn from p itself, without top-k or top-p: unbiased.
    """
    model = load_policy(reference)
    vocabulary = model.tokenizer.get_vocab()
    for one in found:
        if one.vocabulary != vocabulary:
            one.notes.append(f"no KL: {reference} has another vocabulary")
        elif any(rollout.tokens.ids.shape[1] > model.context_length for rollout in one.rollouts):
            one.notes.append(f"no KL: {reference} reads only {model.context_length} tokens")
        else:
            one.values["kl"] = one.each("KL", partial(_gaps, model, task, one.logp))


def _gaps(reference: LanguageModel, task: Task, logps: Sequence[Tensor], rollout: Rollout, index: int) -> list[float]:
    moved = on(rollout, reference.device)
    gap = logps[index] - sequence_logprobs(reference, moved, task.temperature, task.batch_size)
    found: list[float] = gap.tolist()
    return found


def add_scores(
    found: Sequence[Measured], name: str, reward: Reward, parts: dict[str, Callable[[Prompt], bool]] | None = None
) -> None:
    """Add a reward's scores as the metric ``name``, and those on parts of the prompts as ``name_PART``.

    Args:
        found: The policies.
        name: Name of the metric.
        reward: The reward.
        parts: Name of a part -> predicate on prompts. A part that holds no prompts or all of them is left out.
    """
    for one in found:
        scores = one.score(reward)
        one.values[name] = scores
        asked = [prompt for rollout in one.rollouts for prompt in rollout.prompts]
        for part, holds in (parts or {}).items():
            rows = [row for row, prompt in enumerate(asked) if holds(prompt)]
            if 0 < len(rows) < len(scores):
                one.values[f"{name}_{part}"] = [scores[row] for row in rows]
                one.other_clusters[f"{name}_{part}"] = [cluster_key(asked[row]) for row in rows]


def device() -> torch.device:
    """Return the device of the models: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rollout_to_cpu(rollout: Rollout) -> Rollout:
    """Return a rollout with its tensors in main memory, where the responses of all policies are kept."""
    return on(rollout, torch.device("cpu"))


def on(rollout: Rollout, device: torch.device) -> Rollout:
    """Return a rollout with its tensors on a device."""
    names = ("prompt_ids", "prompt_mask", "response_ids", "mask", "logp", "ended")
    return replace(rollout, **{name: getattr(rollout, name).to(device) for name in names})
