"""Benchmark of the techniques of sampling, each with and without it in turn, in one process.

Times are CPU seconds of one thread, medians; other jobs on the machine slow both sides down.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks.models import NAMES, model_folder
from benchmarks.techniques import build
from rlhf.models.language_model import LanguageModel
from rlhf.models.packed_weights import packed_weights
from rlhf.models.padding_free import decode, hidden_states, lay_out
from rlhf.models.slot_cache import PromptStates, SlotCache
from rlhf.sampler import continuous_batching
from rlhf.sampler.ancestral import AncestralSampler, draw_tokens
from rlhf.sampler.continuous_batching import ContinuousBatch, can_decode_in_slots

Run = Callable[[], object]
TOKENS, SAMPLES, PROMPT = 64, 8, 192


def random_prompts(count: int, length: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask of random prompts."""
    ids = torch.randint(10, 2000, (count, length), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids).bool()


def measure(sides: dict[str, Run], repeats: int) -> None:
    """Print the median CPU time of each side, after a first run, in turn; ratios are to the first side."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, run in sides.items():
            start = time.process_time()
            run()
            if repeat > 0:
                times[name].append(time.process_time() - start)
    first = statistics.median(next(iter(times.values())))
    for name, taken in times.items():
        print(f"{name:<64}{statistics.median(taken):8.2f} s{first / statistics.median(taken):8.2f}", flush=True)


def one_prompt(policy: LanguageModel, model: Any, repeats: int) -> None:
    """Time 8 responses to one prompt."""
    ids, mask = random_prompts(1, PROMPT)
    sampler = AncestralSampler(TOKENS, samples=SAMPLES)
    noise = sampler._noise(SAMPLES, TOKENS, 0)

    def slots(context: AbstractContextManager[None]) -> None:
        with context:
            ContinuousBatch(policy, ids, mask, noise, SAMPLES, SAMPLES, sampler._draw).run()

    def generate() -> None:
        arguments = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "num_return_sequences": SAMPLES}
        model.generate(
            input_ids=ids, attention_mask=mask.long(), do_sample=True, top_k=0, top_p=1.0, pad_token_id=0, **arguments
        )

    def growing() -> None:
        with torch.no_grad():
            sampler._decode(policy, ids, mask, noise, SAMPLES)

    sides: dict[str, Run] = {
        "generate": generate,
        "cache of transformers": growing,
        "slots": lambda: slots(nullcontext()),
        "slots, packed weights": lambda: slots(packed_weights(policy)),
    }
    measure(sides, repeats)


def varied_lengths(policy: LanguageModel, repeats: int) -> None:
    """Time 32 responses of geometrically distributed lengths in 8 slots, with and without continuous batching."""
    rows, slots = 32, 8
    ids, mask = random_prompts(rows, 64)
    sampler = AncestralSampler(TOKENS)
    noise = sampler._noise(rows, TOKENS, 0)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(rows).geometric_(1 / 24, generator=generator).clamp(max=TOKENS).long()
    noise[torch.arange(rows), lengths - 1] *= -1  # marks the last token
    steps = 0

    def draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        tokens, logp = draw_tokens(logits, uniform.abs())
        return torch.where(uniform < 0, policy.end_id, torch.where(tokens == policy.end_id, 5, tokens)), logp

    def counted(*arguments: Any) -> Tensor:
        nonlocal steps
        steps += 1
        return decode(*arguments)

    def run(size: int) -> int:
        nonlocal steps
        steps = 0
        with packed_weights(policy):
            for i in range(0, rows, size):
                part = slice(i, i + size)
                ContinuousBatch(policy, ids[part], mask[part], noise[part], 1, slots, draw).run()
        return steps

    continuous_batching.decode = counted
    names = f"{slots} rows at a time, {run(slots)} decode steps", f"continuous batching, {run(rows)} decode steps"
    continuous_batching.decode = decode
    measure(dict(zip(names, (lambda: run(slots), lambda: run(rows)), strict=True)), repeats)


def continuous_batching_of_transformers(policy: LanguageModel, model: Any, repeats: int) -> None:
    """Time transformers' continuous batching against ours: 8 responses to one prompt."""
    ids, mask = random_prompts(1, PROMPT)
    sampler = AncestralSampler(TOKENS, samples=SAMPLES)
    noise = sampler._noise(SAMPLES, TOKENS, 0)
    config = GenerationConfig(max_new_tokens=TOKENS, do_sample=True, top_k=0, top_p=1.0, eos_token_id=-1)

    def paged() -> None:
        settings = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512)
        found = model.generate_batch(
            ids.tolist() * SAMPLES, generation_config=config, continuous_batching_config=settings, warmup=False
        )
        assert all(len(output.generated_tokens) == TOKENS for output in found.values()) and len(found) == SAMPLES

    def ours() -> None:
        with packed_weights(policy):
            ContinuousBatch(policy, ids, mask, noise, SAMPLES, SAMPLES, sampler._draw).run()

    measure({"generate_batch of transformers": paged, "continuous batching": ours}, repeats)


def compiled(policy: LanguageModel, repeats: int) -> None:
    """Time a decode step of 8 rows, compiled by inductor and not; print the time that compiling takes."""
    import torch._inductor.config as inductor

    inductor.freezing = True  # weights may be laid out anew, as `packed_weights` does
    decoder = policy.base.get_decoder()
    ids, mask = random_prompts(1, PROMPT)
    cache = SlotCache(SAMPLES, PROMPT + TOKENS, ids.device)
    noise = torch.rand(SAMPLES)

    def step(tokens: Tensor, lengths: Tensor, layers: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        slots = SlotCache(SAMPLES, cache.columns, ids.device)
        slots.lengths, slots._layers = lengths, layers
        return draw_tokens(policy.head(decode(decoder, tokens, slots, cache.columns)), noise)[0]

    def many(function: Callable[..., Tensor]) -> None:
        for _ in range(20):
            function(ids[0, :SAMPLES], cache.lengths.clone(), cache._layers)

    fast = torch.compile(step, dynamic=False)
    with torch.no_grad():
        layout, states = lay_out(ids, mask, torch.arange(PROMPT)[None]), PromptStates()
        hidden_states(decoder, layout, states)
        lengths = torch.full((SAMPLES,), PROMPT)
        cache.fill(torch.arange(SAMPLES), states, layout.documents.expand(SAMPLES, -1), lengths)
        start = time.process_time()
        fast(ids[0, :SAMPLES], cache.lengths.clone(), cache._layers)
        print(f"compiling: {time.process_time() - start:.0f} s")
        with packed_weights(policy):
            measure({"20 decode steps": lambda: many(step), "20 compiled decode steps": lambda: many(fast)}, repeats)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=[name for name in NAMES if name != "tiny"], default="12m")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=["prompt", "lengths", "transformers", "compile"], action="append")
    args = parser.parse_args()
    torch.set_num_threads(1)
    policy = build(args.model).frozen()
    model = AutoModelForCausalLM.from_pretrained(str(model_folder(args.model)), dtype=torch.float32).eval()
    assert can_decode_in_slots(policy)
    parts: dict[str, Run] = {
        "prompt": lambda: one_prompt(policy, model, args.repeats),
        "lengths": lambda: varied_lengths(policy, args.repeats),
        "transformers": lambda: continuous_batching_of_transformers(policy, model, args.repeats),
        "compile": lambda: compiled(policy, args.repeats),
    }
    for name in args.part or parts:
        print(f"\n{name}")
        parts[name]()


if __name__ == "__main__":
    main()
