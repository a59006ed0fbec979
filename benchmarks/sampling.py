"""Benchmark of K samples per prompt: our sampler against transformers.generate, same model, prompts and lengths."""

import statistics
import time

import torch

from rlhf.data.data import Data
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.precision import Precision
from rlhf.sampler.ancestral import AncestralSampler

ARCHITECTURE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def main(prompts: int = 32, samples: int = 4, tokens: int = 48) -> None:
    """Run both alternately, five times after a warm-up; print the medians and their ratio."""
    torch.manual_seed(0)
    text = Data("text", "testbed", 2000, 0, 128).load()
    policy = CausalLM(None, ARCHITECTURE, 512).load(NoAdapter(), Precision("32-true"), corpus=text.texts).frozen()
    asked = Data("prompt", "testbed", prompts, 8, 128).load().train
    sampler = AncestralSampler(tokens, samples=samples)
    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    for seed in range(6):
        start = time.perf_counter()
        rollout = sampler.sample(policy, asked, seed)
        middle = time.perf_counter()
        first = slice(None, None, samples)
        policy.model.generate(
            input_ids=rollout.prompt_ids[first],
            attention_mask=rollout.prompt_mask[first].long(),
            max_new_tokens=tokens,
            num_return_sequences=samples,
            do_sample=True,
            top_k=0,
            eos_token_id=policy.end_id,
            pad_token_id=policy.pad_id,
        )
        if seed:  # the first round warms up
            seconds["ours"].append(middle - start)
            seconds["transformers"].append(time.perf_counter() - middle)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print({name: f"{value:.2f} s" for name, value in medians.items()})
    print(f"ours / transformers: {medians['ours'] / medians['transformers']:.2f}")


if __name__ == "__main__":
    main()
