"""Several policies on the same prompts from the same random numbers, so that their differences are paired.

Each metric of a policy is a list of numbers, one a prompt (or a document), whose mean is the metric: errors and paired
differences of all metrics follow from these lists in one way (`rlhf.functional.statistics`).
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from rlhf.data.records import Demonstration, Prompt, Text, cluster_of
from rlhf.evaluation import load_policy, sequence_logprobs
from rlhf.likelihood import Likelihood, of_answers, of_texts
from rlhf.models.language_model import LanguageModel
from rlhf.progress import Meter
from rlhf.rollout import Rollout
from rlhf.scoring import Reward
from rlhf.using.generation import SeededSampler, in_batches, room


@dataclass(frozen=True)
class Task:
    """What every policy has to do.

    Args:
        prompts: What is asked.
        texts, dialogues: Documents whose perplexity is measured.
        max_new_tokens: Longest reply. A prompt that leaves a policy less room is refused.
        temperature: Of the sampling, and of the log-probabilities in the KL; at 0 there is no KL.
        seed: Of the sampling.
        batch_size: Rows sampled or scored at a time.
    """

    prompts: list[Prompt]
    texts: list[Text] = field(default_factory=list)
    dialogues: list[Demonstration] = field(default_factory=list)
    max_new_tokens: int = 32
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 64


@dataclass
class Measured:
    """One policy: its replies, and its metrics so far.

    `values` holds by metric one number per prompt or document; `notes` what a reader of the numbers has to know.
    """

    name: str
    path: str
    rollouts: list[Rollout]
    logp: list[Tensor]  # of each rollout's replies, [B] float32; none at temperature 0
    vocabulary: dict[str, int]
    values: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    #: by metric the clusters of its values, where these are not one for each prompt
    other_clusters: dict[str, list[Hashable]] = field(default_factory=dict)

    def clusters(self, metric: str) -> list[Hashable]:
        """Return which values of a metric ask or say the same, for its error."""
        if metric in self.other_clusters:
            return self.other_clusters[metric]
        return [cluster_of(prompt) for rollout in self.rollouts for prompt in rollout.prompts]

    @property
    def texts(self) -> list[str]:
        """The replies, in the order of the prompts."""
        return [text for rollout in self.rollouts for text in rollout.texts]

    def score(self, reward: Reward) -> list[float]:
        """A reward's scores of the replies."""
        return self.each("scoring", lambda rollout, _: reward(on(rollout, device())).float().tolist())

    def each(self, doing: str, values: Callable[[Rollout, int], list[float]]) -> list[float]:
        """A value for every reply, of the rollouts and their numbers one by one; shows how far it is."""
        found: list[float] = []
        with Meter(f"{self.name}: {doing}", len(self.texts), "reply") as meter:
            for index, rollout in enumerate(self.rollouts):
                found += values(rollout, index)
                meter.update(len(found))
        return found


@torch.no_grad()
def measure(name: str, path: str, task: Task, chat_template: str | None = None) -> Measured:
    """A policy's replies to the prompts, and what can be said of it alone: reply length, ended share, perplexities.

    ``chat_template`` is for a policy without its own.
    """
    policy = load_policy(path, chat_template)
    longest = room(policy, task.prompts, task.max_new_tokens)
    sampler = SeededSampler(longest, task.temperature, batch_size=task.batch_size)
    rollouts: list[Rollout] = []
    logp: list[Tensor] = []
    with Meter(name, len(task.prompts), "prompt") as meter:
        for rollout in in_batches(policy, task.prompts, sampler, task.seed):
            if task.temperature > 0:
                logp.append(sequence_logprobs(policy, rollout, task.temperature, task.batch_size))
            rollouts.append(on_cpu(rollout))
            meter.advance(len(rollout.texts))
    found = Measured(name, path, rollouts, logp, policy.tokenizer.get_vocab())
    found.values["length"] = [float(n) for rollout in rollouts for n in rollout.lengths.tolist()]
    found.values["ended"] = [float(e) for rollout in rollouts for e in rollout.ended.tolist()]
    if task.texts:
        _likely(found, "text", of_texts(policy, task.texts), task.texts)
    if task.dialogues:
        _likely(found, "answers", of_answers(policy, task.dialogues), task.dialogues)
    return found


def _likely(found: Measured, what: str, likelihood: Likelihood, documents: Sequence[Text | Demonstration]) -> None:
    found.values[f"perplexity_{what}"] = likelihood.perplexity()
    found.values[f"bits_per_byte_{what}"] = likelihood.bits_per_byte()
    for name in (f"perplexity_{what}", f"bits_per_byte_{what}"):
        found.other_clusters[name] = [cluster_of(document) for document in documents]
    if likelihood.cut:
        found.notes.append(f"{likelihood.cut} dialogues are longer than the context and were read as far as it goes")


@torch.no_grad()
def add_kl(found: Sequence[Measured], reference: str, task: Task) -> None:
    """KL(policy || reference) per reply, nats, of every policy with the reference's vocabulary.

    The mean of log p - log p_ref over replies drawn from p itself, uncut: unbiased.
    """
    model = load_policy(reference)
    vocabulary = model.tokenizer.get_vocab()
    for one in found:
        if one.vocabulary != vocabulary:
            one.notes.append(f"no KL: {reference} has another vocabulary")
        elif any(rollout.ids.shape[1] > model.context_length for rollout in one.rollouts):
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
    """A reward's scores as the metric ``name``, and those on parts of the prompts as ``name_PART``."""
    for one in found:
        scores = one.score(reward)
        one.values[name] = scores
        asked = [prompt for rollout in one.rollouts for prompt in rollout.prompts]
        for part, holds in (parts or {}).items():
            rows = [row for row, prompt in enumerate(asked) if holds(prompt)]
            if 0 < len(rows) < len(scores):
                one.values[f"{name}_{part}"] = [scores[row] for row in rows]
                one.other_clusters[f"{name}_{part}"] = [cluster_of(asked[row]) for row in rows]


def device() -> torch.device:
    """Where models are run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_cpu(rollout: Rollout) -> Rollout:
    """A rollout's tensors in main memory: replies of all policies are kept, their models are not."""
    return on(rollout, torch.device("cpu"))


def on(rollout: Rollout, device: torch.device) -> Rollout:
    """A rollout on a device."""
    names = ("prompt_ids", "prompt_mask", "response_ids", "mask", "logp", "ended")
    return replace(rollout, **{name: getattr(rollout, name).to(device) for name in names})
