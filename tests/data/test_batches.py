import pytest

from rlhf.data.batches import Batches, mix_seed
from rlhf.errors import UserError


def test_a_batch_is_a_function_of_seed_and_index_only():
    whole = list(Batches(10, 3, seed=1, steps=8))
    assert list(Batches(10, 3, seed=1, steps=8, start=5)) == whole[5:]
    assert list(Batches(10, 3, seed=1, steps=20))[:8] == whole
    assert list(Batches(10, 3, seed=2, steps=8)) != whole
    sampler = Batches(10, 3, seed=1, steps=8)
    assert list(sampler) == list(sampler) == whole and len(sampler) == 8


def test_an_epoch_visits_each_example_once():
    batches = list(Batches(10, 3, seed=0, epochs=2))
    assert len(batches) == 6
    for epoch in (batches[:3], batches[3:]):
        drawn = [index for batch in epoch for index in batch]
        assert len(set(drawn)) == 9
    assert batches[:3] != batches[3:]


def test_batches_are_grouped_by_length():
    lengths = [1, 100] * 20
    batches = list(Batches(lengths, 4, seed=0, epochs=1))
    assert sorted(index for batch in batches for index in batch) == list(range(40))
    assert all(len({lengths[index] for index in batch}) == 1 for batch in batches)
    assert list(Batches(lengths, 4, seed=0, epochs=1, start=3)) == batches[3:]
    assert [lengths[batch[0]] for batch in batches] != sorted(lengths[batch[0]] for batch in batches)


def test_ranks_share_the_global_batch():
    whole = list(Batches(16, 4, seed=0, steps=6))
    ranks = [list(Batches(16, 4, seed=0, steps=6, rank=rank, world_size=2)) for rank in range(2)]
    for batch, left, right in zip(whole, *ranks, strict=True):
        assert sorted(left + right) == sorted(batch) and len(left) == len(right) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"batch_size": 11, "steps": 1},
            "stage.batch_size=11: there are only 10 records; type stage.batch_size=10 or less",
        ),
        ({"batch_size": 2}, "either stage.steps or stage.epochs must be set"),
        (
            {"batch_size": 3, "steps": 1, "world_size": 2},
            "stage.batch_size=3: must be a multiple of the 2 devices; type stage.batch_size=4",
        ),
    ],
)
def test_impossible_batches_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Batches(10, seed=0, **arguments)


def test_neighbouring_seeds_give_unrelated_orders():
    seeds = {mix_seed(seed, epoch) for seed in range(30) for epoch in range(30)}
    assert len(seeds) == 900 and all(0 <= seed < 2**63 for seed in seeds)
