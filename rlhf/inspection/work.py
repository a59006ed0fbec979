"""Amounts of work of a stage as numbers: prompts, responses, batches, optimizer steps, tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlhf.data.batches import Batches
from rlhf.data.collate import TokenBatch
from rlhf.data.encoded_rows import Encoded, EncodedComparison, EncodedLabel
from rlhf.data.records import Prompt
from rlhf.stage.base import Stage
from rlhf.stage.experience import chunks
from rlhf.stage.rollout_stage import RolloutStage
from rlhf.storage.plain import Plain

# Rows of the table, in the order in which a step goes through them.
ORDER = (
    "ranks",
    "prompts",
    "passes over the prompts",
    "rollouts",
    "prompts per rollout",
    "prompts per batch",
    "responses per prompt",
    "responses per rollout",
    "responses",
    "tokens sampled, at most",
    "examples",
    "left out of each epoch",
    "epochs",
    "minibatches",
    "microbatch",
    "accumulation",
    "text per optimizer step",
    "optimizer steps",
    "tokens read",
    "tokens trained on",
)


@dataclass(frozen=True)
class Work:
    """Amounts of one step.

    Attributes:
        amounts: Name of the amount in the table of `rlhf inspect plan` -> its value as text.
        batch: Largest micro-batch of a training pass, on the CPU; for a rollout one of full length, with ids that only
            tell rows apart. None if it is unknown.
        text: Largest micro-batch of the pretraining term; None without one.
        accumulation: Micro-batches per optimizer step.
        prompt_length: Tokens of the longest prompt that is sampled from.
    """

    amounts: dict[str, str]
    batch: TokenBatch | None = None
    text: TokenBatch | None = None
    accumulation: int = 1
    prompt_length: int = 0


def tokens_of(example: Any) -> tuple[int, int]:
    """Return (tokens that a model reads, tokens among them that the loss counts) of an encoded example."""
    if isinstance(example, Encoded):
        starts = example.positions or range(len(example))
        return len(example), sum(marked and start > 0 for marked, start in zip(example.mask, starts, strict=True))
    if isinstance(example, EncodedComparison):
        responses = sum(len(example.responses[index]) for index in example.used)
        return len(example.prompt) * len(example.used) + responses, responses
    if isinstance(example, EncodedLabel):
        return len(example), len(example.response)
    return 0, 0


def work_of(stage: Stage, config: Plain) -> Work:
    """Return the amounts of a stage; before it has read its examples, only those that its hyperparameters determine."""
    amounts = {}
    processes = world_size(config)
    if processes > 1:
        amounts["ranks"] = str(processes)
    sampler: Any = getattr(stage, "sampler", None)
    prompts, longest_prompt = _prompts(stage) if sampler is not None else ([], 0)
    if isinstance(stage, RolloutStage):
        work = _of_rollouts(stage, amounts, config, processes, len(prompts), longest_prompt)
    elif stage.produces != "model":
        responses = _limited(len(prompts), stage.batch_size, config, "limit_predict_batches") * sampler.samples
        amounts |= {"prompts": _count(len(prompts)), "responses per prompt": str(sampler.samples)}
        amounts |= {"prompts per batch": _count(stage.batch_size), "responses": _count(responses)}
        amounts["tokens sampled, at most"] = _count(responses * sampler.room(stage.policy))
        work = Work(amounts)
    else:
        if sampler is not None:
            amounts |= {"prompts": _count(len(prompts)), "responses per prompt": str(sampler.samples)}
            amounts["tokens sampled, at most"] = _count(len(prompts) * sampler.samples * sampler.room(stage.policy))
        work = _of_examples(stage, amounts, config, processes)
    return replace(work, prompt_length=longest_prompt)


def _of_rollouts(
    stage: RolloutStage, amounts: dict[str, str], config: Plain, processes: int, prompts: int, longest: int
) -> Work:
    samples = stage.sampler.samples
    rollouts = _steps(stage.steps, config)
    responses = stage.batch_size * samples
    minibatch = -(-responses // stage.minibatches // processes)
    micro = min(stage.micro_batch_size or minibatch, minibatch)
    text = max(1, round(stage.text_ratio * minibatch)) if stage.objective.gamma else 0
    passes = rollouts * stage.batch_size / max(1, prompts)
    amounts |= {
        "prompts": _count(prompts),
        "rollouts": _count(rollouts),
        "prompts per rollout": _count(stage.batch_size),
        "passes over the prompts": f"{passes:.3g}",
        "responses per prompt": str(samples),
        "responses per rollout": _count(responses),
        "epochs": f"{stage.epochs} over each rollout",
        "minibatches": f"{stage.minibatches} of {_count(minibatch)} responses",
        "microbatch": f"{_count(micro)} responses",
        "accumulation": str(-(-minibatch // micro)),
        "optimizer steps": f"{_count(rollouts * stage.epochs * stage.minibatches)}, at most"
        if stage.kl_budget is not None
        else _count(rollouts * stage.epochs * stage.minibatches),
        "tokens sampled, at most": _count(rollouts * responses * stage.sampler.room(stage.policy)),
    }
    if text:
        amounts["text per optimizer step"] = f"{_count(text)} rows of {stage.text_length} tokens"
    batch = _rollout_batch(micro, samples, longest, stage.sampler.room(stage.policy)) if longest else None
    words = _text_batch(min(text, micro), stage.text_length) if text else None
    return Work(amounts, batch, words, -(-minibatch // micro))


def _rollout_batch(rows: int, samples: int, prompt: int, response: int) -> TokenBatch:
    """Return responses of full length, with the samples of a prompt side by side."""
    ids = torch.arange(rows)[:, None].repeat(1, prompt + response) + rows
    ids[:, :prompt] = torch.arange(rows)[:, None] // samples
    is_response = torch.arange(prompt + response) >= prompt
    return TokenBatch.of(ids, torch.ones_like(ids), is_response.expand(ids.shape))


def _text_batch(rows: int, length: int) -> TokenBatch:
    """Return rows of full length that share nothing."""
    ids = torch.arange(rows)[:, None].repeat(1, length)
    return TokenBatch.of(ids, torch.ones_like(ids), torch.ones_like(ids))


def _of_examples(stage: Stage, amounts: dict[str, str], config: Plain, processes: int) -> Work:
    batches: Batches | None = getattr(stage, "batches", None)
    known = batches is not None and len(stage.examples) > 0
    unit = "packed rows" if getattr(stage, "packing", None) else "rows"
    unit = "prompts" if known and isinstance(stage.examples[0], EncodedComparison) else unit
    mine = -(-stage.batch_size // processes)
    micro = min(stage.micro_batch_size or mine, mine)
    amounts["examples"] = f"{_count(len(stage.examples))} {unit}" if known else "unknown until the data is made"
    amounts |= {"epochs": f"{getattr(stage, 'epochs', 1):g}", "minibatches": f"of {_count(stage.batch_size)} {unit}"}
    amounts |= {"microbatch": f"{_count(micro)} {unit}", "accumulation": str(-(-mine // micro))}
    if not known or batches is None:
        return Work(amounts)
    steps = _steps(len(batches), config)
    read = [tokens_of(example) for example in stage.examples]
    order = [batch for _, batch in zip(range(steps), _from_start(batches), strict=False)]
    chosen = [index for batch in order for index in batch]
    amounts["left out of each epoch"] = _count(len(stage.examples) - batches.per_epoch * stage.batch_size)
    amounts["optimizer steps"] = _count(steps)
    amounts["tokens read"] = _count(sum(read[index][0] for index in chosen))
    amounts["tokens trained on"] = _count(sum(read[index][1] for index in chosen))
    parts = (batch[rows] for batch in order for rows in chunks(len(batch), micro))
    largest = max(parts, key=lambda part: sum(read[index][0] for index in part))
    collated = stage.collate([stage.examples[index] for index in largest])
    tokens = collated if isinstance(collated, TokenBatch) else collated.tokens
    return Work(amounts, tokens, None, -(-mine // micro))


def _from_start(batches: Batches) -> Iterable[list[int]]:
    batches.start = 0
    return batches


def _prompts(stage: Stage) -> tuple[Sequence[Prompt], int]:
    """Return the prompts that are sampled from, cut or left out as in training, and the tokens of the longest."""
    data, tokenizer = getattr(stage, "data", None), getattr(stage.policy, "tokenizer", None)
    if data is None or tokenizer is None:
        return getattr(data, "train", []), 0
    prompts, report = data.data.fit_prompts(tokenizer, data.train)
    return prompts, max(report.lengths, default=0)


def _steps(steps: int, config: Plain) -> int:
    """Return the number of training batches under the trainer's limit, which is a number or a share."""
    limit = (config.get("trainer") or {}).get("limit_train_batches")
    if limit is None:
        return steps
    return min(steps, limit) if isinstance(limit, int) else int(steps * limit)


def _limited(examples: int, batch_size: int, config: Plain, key: str) -> int:
    limit = (config.get("trainer") or {}).get(key)
    return min(examples, limit * batch_size) if isinstance(limit, int) else examples


def world_size(config: Plain) -> int:
    """Return the number of ranks of a step, 1 where the config leaves it to the machine."""
    trainer = config.get("trainer") or {}
    devices = trainer.get("devices", 1)
    return (devices if isinstance(devices, int) and devices > 0 else 1) * int(trainer.get("num_nodes") or 1)


def _count(number: int) -> str:
    """Return a count with thousands separators."""
    return f"{number:,}"
