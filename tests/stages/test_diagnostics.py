"""Signs of reward hacking: measured correctly, logged by the stages, warned of once, in words."""

import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from rlhf.callbacks.reward_hacking import (
    HackingWarnings,
    gold_scores,
    look,
    proxy_gold_gap,
    proxy_gold_gap_error,
    response_metrics,
)
from rlhf.data.testbed import gold
from rlhf.sampler.base import single
from rlhf.storage.metrics_file import read_rows
from rlhf.testing import rollout

from . import test_exactness
from .conftest import constant, data, fit
from .test_exactness import Stop, ppo
from .test_ppo import varied
from .test_processes import ByPrompt, Partly

CONF = Path(__file__).parents[2] / "conf" / "callbacks" / "default.yaml"
LIMIT = 0.5
CALM = {
    "length": 10.0,
    "ended": 1.0,
    "repetition": 0.0,
    "distinct": 1.0,
    "special_tokens": 0.0,
    "kl": 1.0,
    "proxy_gold_gap": 0.0,
}


def test_response_metrics_by_hand():
    """'aaaa' and the end: bigrams aa aa aa a., two of four seen before; 'abc': none of three."""
    metrics = response_metrics(rollout(["x"] * 3, ["aaaa", "abc", "abc"]), torch.tensor([1.0, 2.0, 3.0]))
    assert metrics["length"].item() == pytest.approx((5 + 4 + 4) / 3)
    assert metrics["repetition"].item() == pytest.approx(2 / 10)
    assert metrics["distinct"].item() == pytest.approx(2 / 3)
    assert metrics["ended"].item() == 1
    assert (metrics["score"].item(), metrics["score_std"].item()) == (2, 1)
    assert "gold" not in metrics  # unknown for these prompts


def test_gold_scores_exist_for_testbed_prompts_only():
    sampled = rollout(["x"] * 4, ["Sorry, I cannot help with that.", "", "I do not know.", "Yes yes yes."])
    assert gold_scores(sampled) is None
    sampled.prompts[:] = data("prompt").train[:4]
    expected = torch.tensor([gold(p, t).total for p, t in zip(sampled.prompts, sampled.texts, strict=True)])
    assert torch.equal(gold_scores(sampled), expected)
    agree, against, flat = (response_metrics(sampled, x) for x in (2 * expected - 1, -expected, torch.ones(4)))
    assert agree["gold_correlation"].item() == pytest.approx(1, abs=1e-5)
    assert against["gold_correlation"].item() == pytest.approx(-1, abs=1e-5)
    assert flat["gold_correlation"].item() == 0
    assert agree["gold"].item() == pytest.approx(expected.mean().item())


def test_a_single_response_has_zero_score_deviation():
    metrics = response_metrics(rollout(["x"], ["a"]), torch.ones(1))
    assert metrics["score_std"].item() == 0


def test_the_gap_is_in_standard_deviations_of_the_start():
    """The score rises by 3 of its standard deviations, gold by 1 of its own."""
    start = {"score": 1.0, "score_std": 2.0, "gold": 0.5, "gold_std": 0.1}
    assert proxy_gold_gap({"score": 7.0, "gold": 0.6}, start) == pytest.approx(2.0)
    assert proxy_gold_gap(start, start) == 0


@pytest.mark.parametrize(
    ("sign", "metric", "value", "words"),
    [
        ("length_factor", "length", 16.0, "grown from 10.0 to 16.0"),
        ("length_factor", "length", 6.0, "shrunk from 10.0 to 6.0"),
        ("ended", "ended", 0.7, "only 70% of the responses end"),
        ("repetition", "repetition", 0.3, "30% of the pairs of tokens"),
        ("distinct", "distinct", 0.05, "only 5% of the responses differ"),
        ("special_tokens", "special_tokens", 0.2, "20% of the responses have special tokens"),
        ("kl", "kl", 31.0, "31.0 nats per response"),
        ("proxy_gold_gap", "proxy_gold_gap", 1.5, "1.5 standard deviations more than gold"),
    ],
)
def test_each_sign_is_warned_of_once_and_its_limit_is_configurable(sign, metric, value, words, capsys):
    watch = HackingWarnings()
    watch.look("ppo", CALM)
    assert capsys.readouterr().out == ""
    for _ in range(2):
        watch.look("ppo", CALM | {metric: value})
    out = capsys.readouterr().out
    assert out.count("warning") == 1 and words in out and f"(callbacks.hacking.{sign})" in out
    limits = {"length_factor": 5.0, "ended": 0.1, "repetition": 0.9, "distinct": 0.01}
    limits |= {"special_tokens": 0.5, "kl": 1e3, "proxy_gold_gap": 9.0}
    for limit in (limits[sign], None):
        watch = HackingWarnings(**{sign: limit})
        watch.look("ppo", CALM)
        watch.look("ppo", CALM | {metric: value})
    assert capsys.readouterr().out == ""


def test_the_options_are_those_of_the_class_and_null_disables_the_warnings():
    node = OmegaConf.load(CONF).hacking
    assert instantiate(node).__dict__ == HackingWarnings().__dict__
    look(type("T", (), {"callbacks": [], "is_global_zero": True})(), "collect", CALM | {"kl": 1e3})  # no warning


@pytest.mark.usefixtures("whole_start")
def test_ppo_logs_the_signs_and_a_resumed_run_does_not_warn_twice(load, tmp_path, capsys):
    """From a model that does not end: 'ended' warns in the first rollout, and not again after a kill."""

    def run(folder, resume=None, stop=None):
        watch = HackingWarnings(ended=1.0, length_factor=None, repetition=None, distinct=None)
        callbacks = [watch] if stop is None else [watch, stop]
        return fit(varied(load), folder, resume=resume, callbacks=callbacks, limit_val_batches=0)

    metrics = run(tmp_path / "whole")
    assert capsys.readouterr().out.count("warning: only") == 1
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(tmp_path / "killed", stop=Stop(2, tmp_path / "killed"))
    capsys.readouterr()
    (checkpoint,) = (tmp_path / "killed" / "checkpoints").glob("*.ckpt")
    assert run(tmp_path / "killed", resume=checkpoint) == metrics
    assert "warning" not in capsys.readouterr().out
    rows = read_rows(tmp_path / "whole" / "metrics.csv")
    signs = {"length", "ended", "repetition", "distinct", "special_tokens", "kl", "gold", "gold_correlation"}
    signs |= {"proxy_gold_gap", "proxy_gold_gap_se"}
    assert all(signs <= row.keys() for row in rows)


@pytest.mark.usefixtures("whole_start")
def test_the_gap_is_measured_from_the_policy_before_training(load, tmp_path):
    """Measured once on as many prompts as there are, not on the first rollout; recomputed here from that policy."""
    stage = varied(load)
    fit(stage, tmp_path, limit_val_batches=0)
    first = read_rows(tmp_path / "metrics.csv")[0]
    start = stage.start["train"]
    clusters = {prompt.cluster for prompt in stage.examples}  # the question, however it is worded
    assert set(stage.start) == {"train"} and start["clusters"] == len(clusters) < len(stage.examples)
    by_hand = (first["score"] - start["score"]) / start["score_std"] - (first["gold"] - start["gold"]) / start[
        "gold_std"
    ]
    assert first["proxy_gold_gap"] == pytest.approx(by_hand, abs=1e-4) != 0  # the first rollout is one of many draws
    policy, sampler = load().eval(), single(stage.sampler)
    other = sampler.sample(policy, list(stage.examples) * 8, 3)
    again = response_metrics(other, stage.reward(other).float())
    for name in ("score", "gold"):
        error = again[f"{name}_std"].item() / math.sqrt(len(stage.examples))
        assert abs(start[name] - again[name].item()) < 4 * error + 1e-6


def test_the_error_of_the_gap_equals_that_of_the_mean_over_responses():
    torch.manual_seed(0)
    gold_, noise = torch.randn(2, 400).double()
    scores, true = 3 * gold_ + noise, 0.1 * gold_ + 0.4
    now = {
        "score_std": scores.std(),
        "gold_std": true.std(),
        "gold_correlation": torch.corrcoef(torch.stack([scores, true]))[0, 1],
    }
    start = {"score_std": 2.0, "gold_std": 0.2, "gold_correlation": 1.0}
    gaps = scores / 2.0 - true / 0.2
    # The start's own responses have deviation 1 in both units and correlation 1: their gap has none.
    assert proxy_gold_gap_error(now, start, 400, 100) == pytest.approx(gaps.std().item() / 20, rel=1e-6)
    start["gold_correlation"] = 0.0
    both = math.sqrt(gaps.var().item() / 400 + 2 / 100)
    assert proxy_gold_gap_error(now, start, 400, 100) == pytest.approx(both, rel=1e-6)


@pytest.mark.parametrize(
    ("gaps", "error", "said_at"),
    [
        ([0.9, 0.1, 0.1, 0.1, 0.1], 0.05, None),  # one noisy rollout
        ([3.0, 3.0, 3.0], 0.05, None),  # too few for a warning
        ([LIMIT + 0.4] * 6, 0.05, 4),
        ([LIMIT + 0.4] * 6, 0.3, None),  # within two errors of the limit
        ([0.0, 0.0, *[LIMIT + 0.4] * 6], 0.05, 5),  # 3/4 of 0.9, less two errors
    ],
)
def test_the_gap_is_judged_over_several_rollouts_with_its_error(gaps, error, said_at, capsys):
    watch, said = HackingWarnings(proxy_gold_gap=LIMIT), []
    for number, gap in enumerate(gaps, 1):
        resumed = HackingWarnings(proxy_gold_gap=LIMIT)
        resumed.load_state_dict(watch.state_dict())  # with or without an interruption
        watch = resumed
        watch.look("ppo", CALM | {"proxy_gold_gap": gap, "proxy_gold_gap_se": error}, rollouts=4)
        said += [number] if "callbacks.hacking.proxy_gold_gap" in capsys.readouterr().out else []
    assert said == ([] if said_at is None else [said_at])


@pytest.mark.usefixtures("whole_start")
def test_held_out_metrics_are_computed_over_all_responses(load, tmp_path, monkeypatch):
    """The result does not depend on the batches; the spread is that of all responses, not a mean over batches."""

    class Watched(Partly):
        def __call__(self, rollout):
            self.scores = super().__call__(rollout)
            return self.scores

    def still(parameters):
        return torch.optim.SGD(parameters, lr=0.0)

    monkeypatch.setattr(test_exactness, "COMMON", (still, constant))
    found = {}
    for size in (2, 8):
        stage = ppo(load, batch_size=size, steps=1, epochs=1)
        stage.sampler, stage.reward = ByPrompt(10), Watched(idle=False)
        metrics = fit(stage, tmp_path / str(size))
        found[size] = {k: v for k, v in metrics.items() if k.startswith("val/") and "proxy_gold_gap" not in k}
        assert len(stage.reward.scores) == 8  # in one call, so that a reward that whitens reads all of them
        assert found[size]["val/score_std"] == pytest.approx(stage.reward.scores.std().item(), rel=1e-5)
    assert {"val/score_std", "val/gold_correlation", "val/distinct", "val/kl"} <= found[8].keys()
    assert found[2] == pytest.approx(found[8], abs=1e-5)
