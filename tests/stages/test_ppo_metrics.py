"""Metrics that PPO logs, recomputed by plain loops from its rollouts, its experience and the model's forward pass."""

import math
import statistics

import pytest
import torch

from rlhf.sampler.ancestral import AncestralSampler
from rlhf_ppo.objective import PPO

from .conftest import fit
from .test_ppo import Varied, Watched, rows_of, varied

BETA, CLIP, VALUE_CLIP, SCORE_CLIP, PENALTY = 0.3, 0.05, 0.02, 11.0, 1.5


class Measured(Watched):
    """PPO that keeps the statistics of each token of a minibatch as they are just before its update."""

    def update(self, minibatch, first):
        self.tokens = [*getattr(self, "tokens", []), [*self.look(minibatch)]]
        return super().update(minibatch, first)

    @torch.no_grad()
    def look(self, x):
        """Yield (ratio, entropy, value, old value, advantage, return) per token, of rows read alone and unpadded."""
        for row in range(len(x)):
            ids = x.tokens.ids[row][x.tokens.attention_mask[row]][None]
            start, count = ids.shape[1] - int(x.mask[row].sum()), int(x.mask[row].sum())
            logits = self.policy.base(input_ids=ids).logits[0].double().log_softmax(-1)
            states = self.critic.language_model.base.get_decoder()(input_ids=ids).last_hidden_state[0]
            values = (states @ self.critic.head.weight[0]).tolist()
            for t in range(count):
                law = logits[start + t - 1]
                logp, entropy = law[ids[0, start + t]].item(), -(law.exp() * law).sum().item()
                old = x.logp[row, t].item()
                known = [getattr(x, name)[row, t].item() for name in ("values", "advantages", "returns")]
                yield math.exp(logp - old), entropy, values[start + t - 1], *known


def of_an_update(tokens) -> dict[str, float]:
    """Return means over the tokens of one minibatch."""
    rows = []
    for ratio, entropy, value, old_value, advantage, target in tokens:
        held = min(max(value, old_value - VALUE_CLIP), old_value + VALUE_CLIP)
        rows.append(
            {
                "ratio": ratio,
                "ratio_variance": (ratio - 1) ** 2,
                "approx_kl": math.log(ratio) ** 2 / 2,
                "clip_fraction": float(ratio > 1 + CLIP if advantage > 0 else ratio < 1 - CLIP),
                "entropy": entropy,
                "policy_loss": -min(advantage * ratio, advantage * min(max(ratio, 1 - CLIP), 1 + CLIP)),
                "value_loss": max((value - target) ** 2, (held - target) ** 2) / 2,
                "value_clip_fraction": float(abs(value - old_value) > VALUE_CLIP),
            }
        )
        rows[-1]["loss"] = rows[-1]["policy_loss"] + 0.1 * rows[-1]["value_loss"]
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}


def of_a_rollout(rollout, x) -> dict[str, float]:
    """Return statistics of the responses, their scores and the critic."""
    raw = Varied()(rollout).tolist()
    shaped = [
        min(max(score, -SCORE_CLIP), SCORE_CLIP) - (0 if ended else PENALTY)
        for score, ended in zip(raw, rollout.ended.tolist(), strict=True)
    ]
    kl, kl_k3, values, returns = [], [], [], []
    repeated = bigrams = 0
    for row, length in enumerate(rollout.mask.sum(1).tolist()):
        gaps = (x.logp[row, :length] - x.ref_logp[row, :length]).tolist()
        kl.append(sum(gaps))
        kl_k3.append(sum(math.exp(-gap) - 1 + gap for gap in gaps))
        values += x.values[row, :length].tolist()
        returns += x.returns[row, :length].tolist()
        ids = rollout.response_ids[row, :length].tolist()
        pairs = list(zip(ids[:-1], ids[1:], strict=True))
        bigrams += len(pairs)
        repeated += len(pairs) - len({*pairs})
    left = [target - value for target, value in zip(returns, values, strict=True)]
    return {
        "score": statistics.fmean(raw),
        "score_std": statistics.stdev(raw),
        "shaped_score": statistics.fmean(shaped),
        "kl": statistics.fmean(kl),
        "kl_k3": statistics.fmean(kl_k3),
        "rlhf_reward": statistics.fmean(shaped) - BETA * statistics.fmean(kl),
        "length": statistics.fmean(rollout.mask.sum(1).tolist()),
        "ended": statistics.fmean(map(float, rollout.ended.tolist())),
        "repetition": repeated / bigrams,
        "distinct": len({*rollout.texts}) / len(rollout.texts),
        "explained_variance": 1 - statistics.variance(left) / statistics.variance(returns),
        "value": statistics.fmean(values),
        "beta": BETA,
    }


def test_logged_metrics_equal_plain_loops(load, tmp_path):
    objective = PPO(beta=BETA, clip=CLIP, value_clip=VALUE_CLIP, value_coefficient=0.1)
    hyperparameters = {
        "batch_size": 16,
        "steps": 3,
        "score_clip": SCORE_CLIP,
        "missing_eos_penalty": PENALTY,
        "missing_eos": "subtract",
    }
    stage = varied(load, objective, AncestralSampler(48), **hyperparameters)
    stage.__class__ = Measured
    torch.nn.init.normal_(stage.critic.head.weight, generator=torch.Generator().manual_seed(0))
    stage._optimizer = lambda groups: torch.optim.AdamW(groups, lr=3e-2)
    fit(stage, tmp_path, limit_val_batches=0)
    rows = rows_of(tmp_path)
    assert len(rows) == 3 and len(stage.tokens) == 12
    for index, (row, (rollout, _, x)) in enumerate(zip(rows, stage.seen, strict=True)):
        updates = [of_an_update(tokens) for tokens in stage.tokens[4 * index : 4 * index + 4]]
        expected = {name: statistics.fmean(update[name] for update in updates) for name in updates[0]}
        expected |= of_a_rollout(rollout, x)
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    # where nothing moves, or all responses are equal, wrong formulas give these numbers too
    assert any(row["kl"] > 0.05 and abs(row["kl"] - row["kl_k3"]) > 0.02 for row in rows)
    assert any(0 < row["ended"] < 1 for row in rows) and any(row["repetition"] > 0 for row in rows)
    for row in rows:
        assert 0 < row["clip_fraction"] < 1 and 0 < row["value_clip_fraction"] < 1 and row["ratio_variance"] > 1e-3
        assert abs(row["explained_variance"]) > 0.01 and row["score"] - row["shaped_score"] > 0.1
