"""Collectives over rows of several ranks: the same result as one process with all rows."""

import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from rlhf.data.collate import PairBatch, TokenBatch
from rlhf.functional.advantages import explained_variance
from rlhf.functional.distributed import average_gradients, gather_rows, sum_named_tensors
from rlhf.functional.groups import group_advantages
from rlhf.stage.base import Stage
from rlhf_dpo.batch_objective import KTO, Relative
from rlhf_dpo.pairs import Pairs


def test_a_single_rank_keeps_its_rows() -> None:
    rows = torch.arange(6.0).view(3, 2).requires_grad_()
    found, here = gather_rows(rows)
    assert torch.equal(found, rows) and not found.requires_grad and torch.equal(found[here], rows)


def _work(rank: int, store: str, results: str) -> None:
    status = 1
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        torch.save(_results(rank), f"{results}.{rank}")
        status = 0
    finally:
        os._exit(status)


def _results(rank: int) -> dict[str, object]:
    """Return what each rank computes from unequal numbers of rows, and from the losses that read the whole batch."""
    rows = torch.arange(6.0).view(3, 2) if rank == 0 else torch.arange(6.0, 8.0).view(1, 2)
    everything, here = gather_rows(rows)
    ratio = torch.tensor([1.0, 2.0]) if rank == 0 else torch.tensor([6.0])
    z = KTO.reference_point(gather_rows(ratio)[0], gather_rows(torch.zeros_like(ratio))[0])
    batch, policy = whole()
    own = part(batch, slice(0, 2) if rank == 0 else slice(2, 3))
    terms = Pairs(Relative(beta=1.0)).batch_terms(policy, [own])
    values, returns, mask = (x[:, :2] if rank == 0 else x[:, 2:] for x in critic())
    return {
        "explained": explained_variance(values, returns, mask, sum_over),
        "advantages": group_advantages(SCORES[:4] if rank == 0 else SCORES[4:], 2, "batch", sum_over),
        "gradients": gradients(rank),
        "clipped": clipped(rank),
        "means": sum_named_tensors({"both": torch.tensor([1.0 + rank, 2.0]), **own_name(rank)}, torch.device("cpu")),
        "rows": everything,
        "here": (here.start, here.stop),
        "z": z.item(),
        "losses": terms.losses[0],
        "slopes": terms.derivatives[0][0],
    }


SCORES = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 10.0])


def sum_over(part: torch.Tensor) -> torch.Tensor:
    whole = part.clone()
    dist.all_reduce(whole)
    return whole


def critic() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return values, returns and mask, [3, 6], of which one rank has two columns."""
    generator = torch.Generator().manual_seed(3)
    values, returns = torch.randn(2, 3, 6, generator=generator)
    return values, returns, torch.rand(3, 6, generator=generator) > 0.3


def own_name(rank: int) -> dict[str, torch.Tensor]:
    return {} if rank == 0 else {"one": torch.tensor([7.0, 1.0])}


def gradients(rank: int) -> list[torch.Tensor | None]:
    """Average four gradients: present on both ranks, on the first, on the second (in float64), and on none."""
    parameters = [torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64 if i == 2 else None)) for i in range(4)]
    for i in (0, 1 + rank):
        parameters[i].grad = torch.full_like(parameters[i], 2.0 * i + 1 + rank)
    average_gradients(parameters)
    return [parameter.grad for parameter in parameters]


def clipped(rank: int) -> list[float]:
    """Average a gradient of (6, 0) on one rank and (0, 8) on the other, and clip it to norm 1 as a stage does."""
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([6.0, 0.0] if rank == 0 else [0.0, 8.0])
    average_gradients([weight])
    stage = SimpleNamespace(gradient_clip=1.0, trainer=SimpleNamespace(precision_plugin=None))
    Stage.on_before_optimizer_step(stage, torch.optim.SGD([weight], lr=1.0))  # type: ignore[arg-type]
    assert stage._norm.item() == pytest.approx(5.0)
    return weight.grad.tolist()


class Table:
    """Policy whose log-probability of a row is read from a table."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def logprobs(self, tokens):
        return self.values[tokens.ids[:, :1]] * tokens.loss_mask, None


def whole():
    torch.manual_seed(0)
    ids = torch.arange(6).view(6, 1)
    ones = torch.ones(6, 1, dtype=torch.bool)
    chosen, rejected, prompts = torch.tensor([0, 2, 4]), torch.tensor([1, 3, 5]), torch.arange(3)
    batch = PairBatch(
        TokenBatch(ids, ones, ones, torch.zeros_like(ids)),
        chosen,
        rejected,
        torch.zeros(3),
        torch.ones(3),
        prompts,
        None,
        torch.randn(6),
        torch.randn(3, 4),
    )
    return batch, Table(torch.randn(6))


def part(batch, pairs: slice):
    rows = slice(2 * pairs.start, 2 * pairs.stop)
    tokens = TokenBatch(
        *(getattr(batch.tokens, n)[rows] for n in ("ids", "attention_mask", "loss_mask", "position_ids"))
    )
    count = pairs.stop - pairs.start
    first = torch.arange(0, 2 * count, 2)
    return PairBatch(
        tokens,
        first,
        first + 1,
        batch.grade[pairs],
        batch.weight[pairs],
        batch.prompt_index[pairs],
        None,
        batch.reference[rows],
        batch.embedding[pairs],
    )


@pytest.fixture
def results(tmp_path: Path) -> list[dict[str, object]]:
    context = multiprocessing.get_context("fork")
    store, target = str(tmp_path / "store"), str(tmp_path / "result")
    started = [context.Process(target=_work, args=(rank, store, target)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        if process.is_alive():
            process.kill()
        assert process.exitcode == 0
    return [torch.load(f"{target}.{rank}") for rank in range(2)]


def test_two_ranks_compute_what_one_process_would(results: list[dict[str, object]]) -> None:
    first, second = results
    assert torch.equal(first["rows"], torch.arange(8.0).view(4, 2)) and torch.equal(first["rows"], second["rows"])
    assert first["here"] == (0, 3) and second["here"] == (3, 4)
    assert first["z"] == second["z"] == 3.0  # (1 + 2 + 6) / 3, not the mean of the ranks' means
    for found in results:
        assert found["explained"].item() == pytest.approx(explained_variance(*critic()).item())
        assert {name: part.tolist() for name, part in found["means"].items()} == {"both": [3, 4], "one": [7, 1]}
        assert list(found["means"]) == list(first["means"])
        both, one, other, none = found["gradients"]
        assert both.unique().tolist() == [1.5] and one.unique().tolist() == [1.5] and other.unique().tolist() == [3.0]
        assert none is None
        assert found["clipped"] == pytest.approx([0.6, 0.8])  # of the mean (3, 4), not of each rank's own gradient
    together = torch.cat([first["advantages"], second["advantages"]])
    torch.testing.assert_close(
        together, (SCORES - SCORES.view(3, 2).mean(1).repeat_interleave(2)) / SCORES.std(), atol=1e-4, rtol=1e-4
    )
    batch, policy = whole()
    alone = Pairs(Relative(beta=1.0)).batch_terms(policy, [part(batch, slice(0, 1)), part(batch, slice(1, 3))])
    for name in ("losses", "slopes"):
        values = torch.cat(alone.losses if name == "losses" else [by_chosen for by_chosen, _ in alone.derivatives])
        torch.testing.assert_close(torch.cat([first[name], second[name]]), values)
