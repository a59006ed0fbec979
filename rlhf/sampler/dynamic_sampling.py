"""Dynamic sampling (DAPO, Yu et al. 2025, arXiv 2503.14476, section 3.2): replace zero-variance groups.

A group whose responses all have the same score has advantage 0, so the effective batch shrinks as prompts are solved.
Further prompts are sampled in place of such groups. They follow from a seed, so that a resumed run samples the same.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from rlhf.data.records import Prompt
from rlhf.functional.groups import has_spread
from rlhf.sampler.rollout import Rollout, joined


def replace_groups(
    rollout: Rollout,
    scores: Callable[[Rollout], Tensor],
    sample: Callable[[list[Prompt], int], Rollout],
    prompts: Iterator[Prompt],
    samples: int,
    rounds: int,
    pad_id: int,
) -> tuple[Rollout, int]:
    """Replace zero-variance groups by groups of freshly sampled prompts, as far as such groups are found.

    Args:
        rollout: ``samples`` responses to each prompt, in consecutive rows.
        scores: Returns the training scores of a rollout, [B].
        sample: Returns responses to prompts; the second argument is the attempt, from 0.
        prompts: Further prompts, each sampled at most once; it may be exhausted.
        samples: Responses per prompt.
        rounds: Maximum number of attempts; each samples as many prompts as groups are missing.
        pad_id: Padding token.

    Returns:
        A rollout with the same number of groups, and the number of prompts that were sampled in addition.
    """
    asked = 0
    for index in range(rounds):
        idle = (~has_spread(scores(rollout), samples)[::samples]).nonzero()[:, 0].tolist()
        others = [prompt for _, prompt in zip(idle, prompts, strict=False)]
        if not others:
            break
        asked += len(others)
        found = sample(others, index)
        useful = has_spread(scores(found), samples)[::samples].nonzero()[:, 0].tolist()
        groups = list(range(len(rollout.texts) // samples))
        for place, group in zip(idle, useful, strict=False):
            groups[place] = len(rollout.texts) // samples + group
        rows = [group * samples + response for group in groups for response in range(samples)]
        rollout = joined([rollout, found], pad_id).rows(torch.tensor(rows, device=rollout.mask.device))
    return rollout, asked


def fresh_prompts(prompts: Sequence[Prompt], asked: Collection[Prompt], seed: int) -> Iterator[Prompt]:
    """Yield the prompts that are not in ``asked``, each once, in an order fixed by the seed."""
    taken = set(asked)
    for index in torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist():
        if prompts[index] not in taken:
            taken.add(prompts[index])
            yield prompts[index]
