"""Random numbers of a run: a function of its stage and round, equal for the same command, different in other rounds."""

import torch
from omegaconf import OmegaConf

from rlhf.annotator.gold import GoldAnnotator
from rlhf.data.batches import Batches
from rlhf.data.collate import TokenBatch
from rlhf.running.build import derive_step_seed
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.rollout import positions
from rlhf.stage.batch_order import derive_seed
from rlhf_collect.stage import CollectStage

from .conftest import data


def seed(round_: int, name: str = "collect", command: int = 0) -> int:
    return derive_step_seed(OmegaConf.create({"seed": command, "round": round_, "stage": {"name": name}}))


def test_every_part_of_the_identity_of_a_step_changes_its_seed():
    seeds = {seed(r, name, command) for r in (1, 2, 3) for name in ("collect", "dpo", "sft") for command in (0, 1)}
    assert len(seeds) == 3 * 3 * 2
    # An older config without a round is one of the first round.
    assert derive_step_seed(OmegaConf.create({"seed": 0, "stage": {"name": "collect"}})) == seed(1)


def test_rounds_order_their_batches_differently():
    first, again, second = (list(Batches(64, 8, seed(round_), epochs=1)) for round_ in (1, 1, 2))
    assert first == again != second and sorted(sum(first, [])) == sorted(sum(second, []))


@torch.no_grad()
def test_rounds_sample_as_independently_as_two_seeds(load):
    """The share of equal first tokens is the sum of p^2 of the policy's distribution; without rounds it was 1."""
    policy, prompts, samples = load().eval(), data("prompt", 10, 2).train[:8], 64
    sampler = AncestralSampler(1, samples=samples)
    one, again, two = (
        sampler.sample(policy, prompts, derive_seed(seed(r), "collect", 0, 0)).response_ids[:, 0] for r in (1, 1, 2)
    )
    assert torch.equal(one, again)
    rollout = sampler.sample(policy, prompts, 0)
    hidden = policy.hidden(
        TokenBatch.of(rollout.prompt_ids, rollout.prompt_mask, position_ids=positions(rollout.prompt_mask))
    )[:, -1]
    expected = policy.head(hidden).float().softmax(-1).square().sum(-1)  # by row
    share, spread = (one == two).float().mean(), (expected * (1 - expected)).mean() / len(one)
    assert abs(share - expected.mean()) < 4 * spread.sqrt()


def test_annotator_noise_differs_between_rounds(load):
    """The annotator's seed of one batch, by round: its noise averages out over the comparisons of all rounds."""
    prompt = data("prompt", 10, 2).train[0]

    class Recorded(GoldAnnotator):
        seeds: list[int] = []

        def __call__(self, rollout, samples, seed):
            self.seeds.append(seed)
            return []

    for round_ in (1, 1, 2):
        stage = CollectStage(load(), data("prompt", 10, 2), AncestralSampler(2, samples=2), Recorded(), batch_size=1)
        stage.seed, stage.mine = seed(round_), {0}
        stage.file = type("File", (), {"add": lambda *_, **__: None})()
        stage.predict_step([prompt], 0)
    one, again, two = Recorded.seeds
    assert one == again != two
