"""Importance weights against a sampler that is not the policy: by hand, and TRL's own lines."""

import ast
import inspect
import math
import textwrap
from types import SimpleNamespace

import pytest
import torch

from rlhf.functional.sampler_mismatch import correction_weights, probability_errors

MASK = torch.tensor([[True, True, True], [True, True, False]])
SAMPLER = torch.log(torch.tensor([[0.5, 0.2, 0.4], [0.1, 0.5, 0.9]]))
RATIO = torch.tensor([[1.0, 2.0, 0.25], [4.0, 0.5, 8.0]])  # policy over sampler
LOGP = SAMPLER + RATIO.log()


@pytest.mark.parametrize(
    ("mode", "low", "high", "expected", "beyond"),
    [
        ("token_truncate", None, 1.5, [[1, 1.5, 0.25], [1.5, 0.5, 1]], [[0, 1, 0], [1, 0, 0]]),
        ("token_truncate", 0.5, 3.0, [[1, 2, 0.5], [3, 0.5, 1]], [[0, 0, 1], [1, 0, 0]]),
        ("token_mask", 0.4, 3.0, [[1, 2, 0], [0, 0.5, 1]], [[0, 0, 1], [1, 0, 0]]),
        ("sequence_truncate", None, 1.5, [[0.5] * 3, [1.5] * 3], [[0] * 3, [1] * 3]),  # 1 x 2 x 1/4 and 4 x 1/2
        ("sequence_mask", 0.6, None, [[0.0] * 3, [2.0] * 3], [[1] * 3, [0] * 3]),
        ("none", 0.9, 1.1, [[1, 2, 0.25], [4, 0.5, 1]], [[0] * 3, [0] * 3]),
    ],
)
def test_weights_by_hand(mode, low, high, expected, beyond):
    weights, bounded = correction_weights(LOGP, SAMPLER, MASK, mode, low, high)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))
    assert (bounded & MASK).int().tolist() == (torch.tensor(beyond) * MASK).tolist()


def test_equal_log_probabilities_have_weights_of_exactly_one():
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        weights, beyond = correction_weights(LOGP, LOGP.clone(), MASK, mode, 0.5, 2.0)
        assert torch.equal(weights, torch.ones_like(weights)) and not beyond.any()


def test_errors_by_hand():
    """NeMo RL's token_mult_prob_error is the mean of exp(|difference|), so that 2 and 1/2 count the same."""
    errors, gaps = probability_errors(LOGP, SAMPLER, MASK)
    torch.testing.assert_close(errors, torch.tensor([[1.0, 2.0, 4.0], [4.0, 2.0, 1.0]]))
    torch.testing.assert_close(gaps, torch.tensor([[0, math.log(2), math.log(4)], [math.log(4), math.log(2), 0]]))


def test_masked_log_probabilities_have_no_effect():
    sampler = SAMPLER.clone()
    sampler[1, 2] = torch.nan
    for mode in ("token_truncate", "sequence_truncate"):
        weights, _ = correction_weights(LOGP, sampler, MASK, mode, None, 3.0)
        torch.testing.assert_close(weights, correction_weights(LOGP, SAMPLER, MASK, mode, None, 3.0)[0])


def trl_ratio(logp, sampler, mask, mode, low, high):
    """Run TRL's lines, which are inside a method that generates."""
    grpo = pytest.importorskip("trl.trainer.grpo_trainer")
    tree = ast.parse(textwrap.dedent(inspect.getsource(grpo.GRPOTrainer._generate_and_score_completions)))
    (block,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        and any(
            isinstance(line, ast.Assign) and "per_token_logps_diff" in ast.dump(line.targets[0]) for line in node.body
        )
    ]
    names = {
        "self": SimpleNamespace(
            vllm_importance_sampling_mode=mode,
            vllm_importance_sampling_clip_min=low,
            vllm_importance_sampling_clip_max=high,
        ),
        "old_per_token_logps": logp,
        "sampling_per_token_logps": sampler,
        "completion_mask": mask.long(),
        "tool_mask": None,
    }
    exec(compile(ast.Module(block.body, []), "trl", "exec"), vars(grpo) | names, names)  # noqa: S102
    return names["vllm_importance_sampling_ratio"]


@pytest.mark.parametrize(("low", "high"), [(None, 3.0), (0.5, 2.0), (0.8, None)])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_weights_equal_those_of_trl(mode, low, high):
    generator = torch.Generator().manual_seed(0)
    sampler = -2 * torch.rand(16, 9, generator=generator)
    logp = sampler + 0.5 * torch.randn(16, 9, generator=generator)
    mask = torch.arange(9) < torch.randint(1, 10, (16, 1), generator=generator)
    weights, _ = correction_weights(logp, sampler, mask, mode, low, high)
    expected = trl_ratio(logp, sampler, mask, mode, low, high).expand_as(weights)
    torch.testing.assert_close(weights * mask, expected * mask)
