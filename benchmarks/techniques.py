"""Benchmark of each technique alone: the same loss and gradient with it and without it, in turn, in one process."""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.models import NAMES, VOCABULARY, model_folder
from rlhf.data.collate import TokenBatch, collate
from rlhf.data.encoded_rows import Encoded
from rlhf.models import padding_free
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.language_model import LanguageModel
from rlhf.models.precision import Precision


def build(name: str) -> LanguageModel:
    """Load a model of `benchmarks.models`."""
    spec = CausalLM(str(model_folder(name)), None, None)
    return spec.load(NoAdapter(), Precision("32-true")).disable_dropout()


def rows(prompts: int, samples: int, prompt: int, responses: tuple[int, int]) -> TokenBatch:
    """Return random rows on which training sees the response alone.

    Args:
        prompts: Number of prompts.
        samples: Rows of each prompt.
        prompt: Tokens of a prompt.
        responses: Shortest and longest response, tokens; lengths between them are equally likely.
    """
    generator = torch.Generator().manual_seed(1)
    draw: Callable[[int], list[int]] = lambda n: torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
    encoded = []
    for _ in range(prompts):
        shared = draw(prompt)
        for _ in range(samples):
            own = draw(int(torch.randint(responses[0], responses[1] + 1, (1,), generator=generator)))
            encoded.append(Encoded(shared + own, [False] * len(shared) + [True] * len(own)))
    return collate(encoded, 0)


#: Name -> (rows, what is switched).
CASES: dict[str, tuple[TokenBatch, str]] = {
    "padding: 8 dialogues of 64 to 512 tokens": (rows(8, 1, 32, (32, 480)), "padding_free"),
    "shared prompt: 8 pairs, 192 + 64 tokens": (rows(8, 2, 192, (64, 64)), "padding_free"),
    "shared prompt: 4 prompts x 8 samples, 192 + 64": (rows(4, 8, 192, (64, 64)), "padding_free"),
    "blocks of attention: 8 pairs, 192 + 64 to 320": (rows(8, 2, 192, (64, 320)), "blocks"),
    "blocks of attention: 4 prompts x 8, 192 + 64": (rows(4, 8, 192, (64, 64)), "blocks"),
    "uniform gradient: 8 x 512 tokens": (rows(8, 1, 1, (511, 511)), "uniform"),
}


def seconds(model: LanguageModel, batch: TokenBatch, uniform: bool) -> tuple[float, Tensor]:
    """Return the CPU seconds of both passes of the mean log-probability, and the gradient of the embedding."""
    model.zero_grad()
    start = time.process_time()
    logp, _ = model.logprobs(batch, uniform=uniform)
    (logp.sum() / batch.loss_mask.sum()).backward()
    gradient = model.base.get_input_embeddings().weight.grad
    assert isinstance(gradient, Tensor)
    return time.process_time() - start, gradient.clone()


def main() -> None:
    """Print a table of medians, ratios and the largest difference of the gradients."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=[name for name in NAMES if name != "tiny"], default="12m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", choices=sorted({switch for _, switch in CASES.values()}), help="one technique alone")
    args = parser.parse_args()
    model = build(args.model)
    is_supported = padding_free.is_supported
    print(f"{'case':<50}{'without':>10}{'with':>10}{'ratio':>8}{'gradient':>12}")
    chosen = {name: case for name, case in CASES.items() if args.case in (None, case[1])}
    for name, (batch, switch) in chosen.items():
        times: dict[bool, list[float]] = {False: [], True: []}
        gradients: dict[bool, Tensor] = {}
        for repeat in range(args.repeats + 1):
            for on in (False, True):
                model.padding_free = on and switch == "padding_free" or switch == "blocks"
                padding_free.is_supported = is_supported if on and switch == "blocks" else lambda _: False
                taken, gradients[on] = seconds(model, batch, uniform=on and switch == "uniform")
                if repeat:  # the first one warms up
                    times[on].append(taken)
        without, with_it = (statistics.median(times[on]) for on in (False, True))
        difference = ((gradients[True] - gradients[False]).abs().max() / gradients[False].abs().max()).item()
        print(f"{name:<50}{without:>8.2f} s{with_it:>8.2f} s{without / with_it:>8.2f}{difference:>12.1e}", flush=True)


if __name__ == "__main__":
    main()
