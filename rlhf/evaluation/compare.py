"""Comparison of two policies on the same held-out prompts, with standard errors: the effect of training.

Both respond to every prompt, sampled from the same random numbers, so that differences are paired: the noise of prompts
that are hard for both cancels.
"""

import hashlib
import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from rlhf.data import contamination
from rlhf.data.records import Prompt, Text, cluster_key
from rlhf.data.sources import TESTBED
from rlhf.errors import UserError
from rlhf.evaluation.best_of_n import BestOfN, best_of_n, score_responses
from rlhf.evaluation.perplexity import text_likelihood
from rlhf.functional.statistics import Difference, Estimate, estimate, paired
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.language_model import LanguageModel
from rlhf.models.precision import Precision, stored_precision
from rlhf.reward.gold import GoldReward
from rlhf.reward.model import ModelReward
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.rollout import Rollout
from rlhf.storage.files import read_json, write_text

Positive = Annotated[int, Field(gt=0)]

FORMAT = 2  # version of the cached result; increase it when the computation changes
# Names of the metrics in tables.
LABELS = {
    "gold": "gold reward",
    "gold_safe": "gold reward, safe prompts",
    "gold_unsafe": "gold reward, unsafe prompts",
    "reward": "model's reward",
    "length": "response length (tokens)",
    "ended": "share of responses that end",
    "text_loss": "loss on pretraining text (nats per token)",
}


class PromptData(Protocol):
    """Interface of a data set of prompts (`rlhf.data.Data`)."""

    source: str

    def load(self) -> Any:
        """Return the split of the data into training and validation records."""


@dataclass(frozen=True)
class Sample:
    """One prompt with both responses and their scores by metric."""

    prompt: str
    tags: list[str]
    before: str
    after: str
    before_scores: dict[str, float]
    after_scores: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Result of `compare`.

    `before` and `after` map metrics to estimates: gold (the testbed's true reward; gold_safe and gold_unsafe are its
    parts), reward (the reward model's), length (tokens), ended (share of responses that reached their end-of-turn
    token), text_loss (cross-entropy per token of held-out pretraining text, as in `rlhf.evaluation.perplexity`: the
    cost of alignment; its paired difference is over documents). Standard errors are clustered: prompts that ask the
    same and documents that state the same are one cluster. `kl` is KL(after || before) per response, in nats, at the
    sampling temperature; None if the tokenizers differ.
    """

    before_model: str
    after_model: str
    prompts: int
    temperature: float
    seed: int
    before: dict[str, Estimate]
    after: dict[str, Estimate]
    differences: dict[str, Difference]
    kl: Estimate | None
    samples: list[Sample]
    best_of_n: list[BestOfN] = field(default_factory=list)  # of `before`; differences are those of `after` to it

    @property
    def clusters(self) -> int:
        """Number of clusters of prompts, those that ask the same being one."""
        return self.after["length"].clusters

    def metrics(self) -> dict[str, float]:
        """Return the result as plain numbers: before_gold, after_gold, gold_difference, gold_z, after_kl, ..."""
        flat: dict[str, float] = {}
        for name in self.after:
            flat[f"before_{name}"], flat[f"after_{name}"] = self.before[name].mean, self.after[name].mean
            flat[f"{name}_difference"], flat[f"{name}_z"] = self.differences[name].mean, self.differences[name].z
        if self.kl is not None:
            flat["after_kl"], flat["after_kl_se"] = self.kl.mean, self.kl.se
        for best in self.best_of_n:
            flat[f"best_of_{best.n}_kl"] = best.kl.mean
            for name, value in best.metrics.items():
                flat[f"best_of_{best.n}_{name}"] = value.mean
                flat[f"best_of_{best.n}_{name}_difference"] = best.differences[name].mean
        return flat

    def table(self) -> list[tuple[str, str, str, str]]:
        """Return rows (metric, before, after, difference) for a table on the screen."""
        rows = [
            (LABELS.get(name, name), str(self.before[name]), str(self.after[name]), str(self.differences[name]))
            for name in self.after
        ]
        if self.kl is not None:
            rows.append(("KL(after || before) per response (nats)", "0", str(self.kl), ""))
        for best in self.best_of_n:
            for name, value in best.metrics.items():
                label = f"{LABELS[name]}, best of {best.n}"
                rows.append((label, str(value), str(self.after[name]), str(best.differences[name])))
            rows.append((f"KL(best of {best.n} || before)", str(best.kl), "", ""))
        return rows

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "Evaluation":
        """Build the result from the values of `to_json`."""
        return cls(
            **{
                **raw,
                "before": {name: Estimate(**value) for name, value in raw["before"].items()},
                "after": {name: Estimate(**value) for name, value in raw["after"].items()},
                "differences": {name: Difference(**value) for name, value in raw["differences"].items()},
                "kl": None if raw["kl"] is None else Estimate(**raw["kl"]),
                "samples": [Sample(**value) for value in raw["samples"]],
                "best_of_n": [BestOfN.from_json(value) for value in raw.get("best_of_n", ())],
            }
        )


def compare(
    before: Path | str,
    after: Path | str,
    prompts: Sequence[Prompt] | PromptData,
    reward_model: Path | str | None = None,
    text: PromptData | None = None,
    *,
    gold: bool | None = None,
    count: Positive = 400,
    max_new_tokens: Positive = 32,
    temperature: Annotated[float, Field(gt=0)] = 1.0,
    seed: int = 0,
    folder: Path | None = None,
    batch_size: Positive = 128,
    best_of: Positive = 1,
) -> Evaluation:
    """Compare two policies on held-out prompts; a result computed before is read from its file.

    Args:
        before: Model directory or hub id of the first policy.
        after: Model directory or hub id of the second policy.
        prompts: The prompts, or a data set whose held-out part is used.
        reward_model: Directory of a reward model that scores the responses too.
        text: Data set of documents; both policies are measured as language models on its held-out part.
        gold: Whether the testbed's labeller scores the responses; by default if the prompts are a data set of the
            testbed.
        count: Number of prompts, the first ones; also of documents of `text`.
        max_new_tokens: Longest response, in tokens.
        temperature: Of sampling, and of the log-probabilities whose difference is the KL; above 0.
        seed: Seed of sampling.
        folder: Directory in which the result is cached, as `evaluation-<key>.json`; None: no cache.
        batch_size: Rows sampled or scored at a time.
        best_of: Also measure the first policy with the best of 2, 4, ... this many responses, chosen by the reward
            model, else by gold reward; 1: not.

    Raises:
        UserError: There are no prompts, or no held-out documents.
    """
    if gold is None:
        gold = not isinstance(prompts, Sequence) and prompts.source == TESTBED
    documents: list[Text] = [] if text is None else list(text.load().validation[:count])
    if text is not None and not documents:
        raise UserError("no held-out documents to compare on", fix="type compare.text.validation=400")
    asked = list(prompts if isinstance(prompts, Sequence) else prompts.load().validation)[:count]
    if not asked:
        raise UserError(
            "no held-out prompts to compare on", fix="type compare.data.validation=400, or give more prompts"
        )
    if best_of > 1 and not gold and reward_model is None:
        raise UserError("needs a score that chooses the best", "give a reward model", "compare.best_of", best_of)
    for line in contamination.check_models(asked, (before, after, reward_model)):
        print(f"  compare: {line}", flush=True)
    settings = (max_new_tokens, temperature, seed, *([[document.text for document in documents]] if documents else []))
    settings += (("best of", best_of),) if best_of > 1 else ()
    key = _key(before, after, reward_model, gold, asked, *settings)
    cached = None if folder is None else Path(folder) / f"evaluation-{key}.json"
    if cached is not None and cached.is_file():
        content, reason = read_json(cached)
        try:
            return Evaluation.from_json(content)
        except (KeyError, TypeError, ValueError, AttributeError):
            print(f"  compare: {cached}: {reason or 'is not an evaluation'}; computed again", flush=True)
    result = _compare(
        before, after, asked, documents, reward_model, gold, max_new_tokens, temperature, seed, batch_size, best_of
    )
    if cached is not None:
        write_text(cached, json.dumps(result.to_json(), indent=1, ensure_ascii=False))
    return result


@torch.no_grad()
def _compare(
    before: Path | str,
    after: Path | str,
    prompts: list[Prompt],
    documents: list[Text],
    reward_model: Path | str | None,
    gold: bool,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    best_of: int,
) -> Evaluation:
    sampler = AncestralSampler(max_new_tokens=max_new_tokens, temperature=temperature, batch_size=batch_size)

    policy = load_policy(after)  # one model in memory at a time
    new = sampler.sample(policy, prompts, seed)
    logp_after = sequence_logprobs(policy, new, temperature, batch_size)
    vocabulary = policy.tokenizer.get_vocab()
    text_after = text_likelihood(policy, documents).loss()
    del policy

    policy = load_policy(before)
    old = sampler.sample(policy, prompts, seed)
    kl = None
    asked = [cluster_key(prompt) for prompt in prompts]
    if policy.tokenizer.get_vocab() == vocabulary:
        # E_after[log after - log before]: unbiased, as the responses are drawn from `after` without top-k or top-p.
        kl = estimate((logp_after - sequence_logprobs(policy, new, temperature, batch_size)).tolist(), asked)
    text_before = text_likelihood(policy, documents).loss()
    many = None
    if best_of > 1:
        sampler.samples = best_of
        many = sampler.sample(policy, prompts, seed)
    del policy

    scores: dict[str, tuple[list[float], list[float]]] = {}
    of_many: dict[str, Tensor] = {}
    clusters: dict[str, list[Hashable]] = {"text_loss": [cluster_key(document) for document in documents]}

    def score(name: str, measure: Callable[[Rollout], Tensor]) -> None:
        scores[name] = (measure(old).float().tolist(), measure(new).float().tolist())
        if many is not None and name in ("gold", "reward"):
            of_many[name] = score_responses([many], measure, best_of)

    if gold:
        score("gold", GoldReward())
    if reward_model is not None:
        reward = ModelReward(str(reward_model))
        reward.to(new.mask.device)
        score("reward", reward)
    score("length", lambda rollout: rollout.lengths)
    score("ended", lambda rollout: rollout.ended)
    if documents:
        scores["text_loss"] = (text_before, text_after)

    whole = dict(scores)
    unsafe = [prompt.unsafe for prompt in prompts]
    if gold and any(unsafe) and not all(unsafe):
        for part, wanted in (("gold_safe", False), ("gold_unsafe", True)):
            rows = [row for row, is_unsafe in enumerate(unsafe) if is_unsafe is wanted]
            old_scores, new_scores = ([values[row] for row in rows] for values in scores["gold"])
            scores[part], clusters[part] = (old_scores, new_scores), [asked[row] for row in rows]
    best = []
    if of_many:
        best = best_of_n(prompts, of_many, {name: scores[name][1] for name in of_many})[1:]
    order = [name for name in LABELS if name in scores]
    return Evaluation(
        before_model=str(before),
        after_model=str(after),
        prompts=len(prompts),
        temperature=temperature,
        seed=seed,
        before={name: estimate(scores[name][0], clusters.get(name, asked)) for name in order},
        after={name: estimate(scores[name][1], clusters.get(name, asked)) for name in order},
        differences={name: paired(*scores[name], clusters.get(name, asked)) for name in order},
        kl=kl,
        samples=_samples(prompts, old, new, {name: v for name, v in whole.items() if name != "text_loss"}),
        best_of_n=best,
    )


def load_policy(
    path: Path | str, chat_template: str | None = None, precision: Precision | None = None
) -> LanguageModel:
    """Load a policy in eval mode, on the GPU if there is one.

    Args:
        path: Model directory, run directory, GGUF file or hub id.
        chat_template: Replaces the model's own. Embeddings of tokens that it adds are the same each time.
        precision: Format of the weights; None: as they are stored.
    """
    spec = CausalLM(path=str(path), architecture=None, vocab_size=None, chat_template=chat_template)
    with torch.random.fork_rng(devices=[], enabled=chat_template is not None):
        if chat_template is not None:
            torch.manual_seed(0)
        policy = spec.load(NoAdapter(), precision or stored_precision(spec.config())).frozen()
    return policy.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def sequence_logprobs(policy: LanguageModel, rollout: Rollout, temperature: float, batch_size: int) -> Tensor:
    """Return the log-probability of each response as a whole under a policy, [B] float32, on the CPU."""
    sums, tokens = [], rollout.tokens
    for start in range(0, len(rollout.texts), batch_size):
        logp, _ = policy.logprobs(tokens[start : start + batch_size], temperature)
        sums.append(logp.sum(dim=1).cpu())
    return torch.cat(sums)


def _samples(
    prompts: list[Prompt], old: Rollout, new: Rollout, scores: dict[str, tuple[list[float], list[float]]]
) -> list[Sample]:
    """Return three prompts with their responses: the first ones, with one unsafe prompt among them if there is any."""
    unsafe = [i for i, prompt in enumerate(prompts) if prompt.unsafe][:1]
    safe = [i for i in range(len(prompts)) if i not in unsafe]
    return [
        Sample(
            prompt=prompts[i].messages[-1].content,
            tags=list(prompts[i].tags),
            before=old.texts[i],
            after=new.texts[i],
            before_scores={name: values[0][i] for name, values in scores.items()},
            after_scores={name: values[1][i] for name, values in scores.items()},
        )
        for i in sorted(safe[: 3 - len(unsafe)] + unsafe)
    ]


def _key(
    before: Path | str,
    after: Path | str,
    reward_model: Path | str | None,
    gold: bool,
    prompts: list[Prompt],
    *settings: object,
) -> str:
    """Return the cache key of a result: a hash of everything that it is computed from."""
    models = [None if path is None else _identity(path) for path in (before, after, reward_model)]
    asked = [prompt.to_json() for prompt in prompts]
    text = json.dumps([FORMAT, models, gold, asked, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _identity(path: Path | str) -> list[Any]:
    """Return a model's identity: path, size and time of the weights of a directory, or the name of a hub id."""
    folder = Path(path)
    if not folder.is_dir():
        return [str(path)]
    weights = sorted(folder.rglob("*.safetensors"))
    return [str(folder.resolve()), [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weights]]
