"""Dynamic sampling (DAPO, Yu et al. 2025, arXiv 2503.14476, section 3.2): other prompts where a group teaches nothing.

A group whose replies all score the same has advantage 0, so a batch shrinks as prompts are solved. Here further prompts
are sampled in their place. Which ones follows from a seed, so that a resumed run samples the same.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from rlhf.data.records import Prompt
from rlhf.functional.groups import has_spread
from rlhf.rollout import Rollout, joined


def refill(
    rollout: Rollout,
    scores: Callable[[Rollout], Tensor],
    sample: Callable[[list[Prompt], int], Rollout],
    prompts: Iterator[Prompt],
    samples: int,
    rounds: int,
    pad_id: int,
) -> tuple[Rollout, int]:
    """A rollout of as many groups, those without spread replaced as far as others are found; and how many were sampled.

    Args:
        rollout: ``samples`` replies to each prompt, in consecutive rows.
        scores: The scores that are learnt from, [B], of a rollout.
        sample: Replies to some prompts; the number is that of the round.
        prompts: Further prompts, each asked at most once; it may run out.
        samples: Replies per prompt.
        rounds: Most times that prompts are sampled, each time as many as groups are missing.
        pad_id: Token that padding is made of.
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
        rows = [group * samples + reply for group in groups for reply in range(samples)]
        rollout = joined([rollout, found], pad_id).rows(torch.tensor(rows, device=rollout.mask.device))
    return rollout, asked


def others_in_order(prompts: Sequence[Prompt], asked: Collection[Prompt], seed: int) -> Iterator[Prompt]:
    """The prompts that were not asked, in an order that the seed fixes."""
    taken = set(asked)
    for index in torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist():
        if prompts[index] not in taken:
            taken.add(prompts[index])
            yield prompts[index]
