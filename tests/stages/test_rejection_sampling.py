"""Rejection sampling: training on the selected responses, KL, earlier rounds, interruptions, and several ranks."""

import copy
import json
import math

import pytest
import torch

from rlhf.callbacks.reward_hacking import HackingWarnings
from rlhf.data.records import Message, Prompt
from rlhf.errors import UserError
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.precision import Precision
from rlhf.objective import CrossEntropy
from rlhf.reward.base import Reward
from rlhf.runs.run_directory import Run
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.best_of_k import BestOfK
from rlhf.storage.metrics_file import read_rows
from rlhf.testing import tiny_model
from rlhf_rejection_sampling.selection import prompt_key, read_selected
from rlhf_rejection_sampling.stage import RejectionSamplingStage

from .conftest import ARCHITECTURE, adamw, constant, data, dies, fit, same, weights
from .test_exactness import Stop


class Letters(Reward):
    """Reward that counts letters, which differs between any two random responses."""

    def __call__(self, rollout):
        return torch.tensor([float(len(set(text))) for text in rollout.texts], device=rollout.mask.device)


def stage_on(load, reward=None, sampler=None, model=None, **hyperparameters) -> RejectionSamplingStage:
    hyperparameters = {"batch_size": 8, "epochs": 1, **hyperparameters}
    return RejectionSamplingStage(
        model or load(),
        CrossEntropy(),
        data("prompt", 16, 8),
        reward or Letters(),
        sampler or BestOfK(8, samples=4),
        adamw,
        constant,
        **hyperparameters,
    )


def rows_of(folder):
    return [json.loads(line) for line in (folder / "selected_responses.jsonl").read_text().splitlines()]


def test_the_best_are_selected_and_trained_on(load, tmp_path, figures):
    stage = stage_on(load)
    fit(stage, tmp_path)
    found = json.loads((tmp_path / "best_of_k.json").read_text())
    metrics = stage.final_metrics()
    assert metrics["reward_selected"] == pytest.approx(metrics["reward_best"])
    assert metrics["reward_best"] > metrics["reward_mean"]
    assert metrics["best_of_k_gain"] == pytest.approx(found["gain_by_k"]["4"])
    assert metrics["kl_bound"] == pytest.approx(math.log(4) - 3 / 4)
    assert metrics["gain_of_best/2"] < metrics["gain_of_best/4"]
    assert metrics["val/score_gain"] == pytest.approx(metrics["val/score"] - metrics["val/score_before"])
    assert len(rows_of(tmp_path)) == 16 and read_rows(tmp_path / "metrics.csv")
    assert (tmp_path / "best_of_k.png").read_bytes().startswith(b"\x89PNG")


def in_leaps(parameters):
    """Build an optimizer that moves the policy far."""
    return torch.optim.AdamW(parameters, lr=2e-2)


def drawn():
    """Return a model with random weights, which cannot be loaded again."""
    torch.manual_seed(5)
    return CausalLM(None, ARCHITECTURE, 320).load(NoAdapter(), Precision("32-true"), data("demonstration", 200).texts)


def log_softmax_of_all(model, rollout):
    """Return log-probabilities [B, R] of the responses' tokens by full log-softmax: one row at a time, all logits."""
    found = torch.zeros(rollout.mask.shape)
    for row in range(len(rollout.texts)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        response = rollout.response_ids[row][rollout.mask[row]]
        logits = model.model(input_ids=torch.cat([prompt, response])[None]).logits[0].double()
        logp = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, response[:, None])[:, 0]
        found[row, : len(response)] = logp.float()
    return found


@pytest.mark.parametrize("who", ["itself", "itself with lora", "itself, drawn", "another"])
def test_kl_equals_that_of_the_two_models_on_the_responses(load, folder, tmp_path, who):
    model = drawn() if "drawn" in who else load(lora="lora" in who)
    before = copy.deepcopy(model).eval()
    if who == "another":  # the policy starts elsewhere; the sampling policy is the one in the directory
        model.origin = "elsewhere"
        with torch.no_grad():
            model.base.get_output_embeddings().weight.mul_(1.1)
    stage = stage_on(
        load, model=model, sampling_model=str(folder) if who == "another" else None, epochs=3, micro_batch_size=3
    )
    assert (stage.start is not None) == ("drawn" in who)  # all others can be loaded again
    stage._optimizer = in_leaps
    fit(stage, tmp_path)
    after = stage.policy.eval()
    with torch.no_grad():
        responses = stage.sample_held_out(after)
        logp, ref_logp = (log_softmax_of_all(one, responses) for one in (after, before))
    ratio = (logp - ref_logp) * responses.mask
    metrics = stage.final_metrics()
    assert metrics["val/kl"] == pytest.approx(ratio.sum(1).mean().item(), abs=1e-4)
    assert metrics["val/kl_k3"] == pytest.approx(((-ratio).exp() - 1 + ratio).sum(1).mean().item(), abs=1e-4)
    assert metrics["val/kl"] > 0.01


@pytest.mark.parametrize("lora", [False, True])
def test_without_training_kl_is_zero(load, tmp_path, lora):
    stage = stage_on(load, model=load(lora=lora))
    stage._scheduler = lambda step, total: 0.0
    fit(stage, tmp_path)
    metrics = stage.final_metrics()
    assert metrics["val/kl"] == metrics["val/kl_k3"] == 0


def test_kl_is_monitored_for_reward_hacking(load, tmp_path, capsys):
    watch = HackingWarnings(None, None, None, None, None, 1e-6, None)
    stage = stage_on(load, epochs=3)
    stage._optimizer = in_leaps
    fit(stage, tmp_path, callbacks=[watch])
    assert watch.warned == ["kl"] and "nats per response from its reference" in capsys.readouterr().out


def test_kl_is_omitted_for_a_sampler_with_another_vocabulary(load, tmp_path, capsys):
    tiny_model(("Where does Amy live?", "Amy lives in Bath.")).save(tmp_path / "other")
    stage = stage_on(load, sampling_model=str(tmp_path / "other"))
    fit(stage, tmp_path / "run")
    assert "val/kl is not measured" in capsys.readouterr().out
    assert "val/score" in stage.final_metrics() and "val/kl" not in stage.final_metrics()


def test_random_selections_score_the_mean(load, tmp_path):
    stage = stage_on(load, sampler=BestOfK(8, samples=16), select="random_overall")
    fit(stage, tmp_path)
    metrics = stage.final_metrics()
    assert abs(metrics["reward_selected"] - metrics["reward_mean"]) < 0.5 * metrics["best_of_k_gain"]


def test_each_temperature_is_reported(load, tmp_path):
    stage = stage_on(load, sampler=BestOfK(8, samples=4, temperatures=[0.7, 1.3]))
    fit(stage, tmp_path)
    metrics = stage.final_metrics()
    assert metrics["share_of_best_at/0.7"] + metrics["share_of_best_at/1.3"] == pytest.approx(1)
    mean = (metrics["reward_mean_at/0.7"] + metrics["reward_mean_at/1.3"]) / 2
    assert mean == pytest.approx(metrics["reward_mean"], abs=1e-5)
    assert {row["temperature"] for row in rows_of(tmp_path)} <= {0.7, 1.3}


# -- earlier rounds, and the base ------------------------------------------------------------------------------------


def test_best_samples_of_earlier_rounds_are_kept_if_configured(load, tmp_path):
    """They are scored again beside the fresh responses, so a prompt still has one selected response."""
    fit(stage_on(load, sampler=BestOfK(8, samples=12)), tmp_path / "first")
    earlier = [str(tmp_path / "first")]
    results = {}
    for keep in (True, False):
        stage = stage_on(load, sampler=BestOfK(8, samples=2), earlier=earlier, keep_earlier=keep)
        fit(stage, tmp_path / str(keep))
        results[keep] = (stage.final_metrics(), rows_of(tmp_path / str(keep)), weights(stage))
    kept, fresh = results[True], results[False]
    assert kept[0]["earlier_share"] > 0.4 and fresh[0]["earlier_share"] == 0
    assert kept[0]["reward_selected"] > fresh[0]["reward_selected"]
    assert kept[0]["reward_best"] == fresh[0]["reward_best"]  # of this round's responses alone
    assert len(kept[1]) == len(fresh[1]) == 16
    assert not same(kept[2], fresh[2])
    texts = {(prompt_key(c.prompt), c.response) for c in read_selected(earlier[0])}
    for row in kept[1]:
        if row["temperature"] is None:
            assert (prompt_key(Prompt.from_json(row)), row["response"]) in texts


def test_responses_to_unused_prompts_are_kept(load, tmp_path):
    file = tmp_path / "selected_responses.jsonl"
    prompt = Prompt((Message("user", "something else"),))
    file.write_text(json.dumps({**prompt.to_json(), "response": "old"}) + "\n")
    stage = stage_on(load, earlier=str(file))
    fit(stage, tmp_path / "run")
    assert [row["response"] for row in rows_of(tmp_path / "run")][-1] == "old"
    assert len(rows_of(tmp_path / "run")) == 17


def test_the_sampling_policy_differs_from_the_trained_model(load, folder, tmp_path):
    """Restart from the base: the selected responses are those of the sampler, the weights those of the base."""
    own = stage_on(load)
    fit(own, tmp_path / "own")
    base = load()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    stage = stage_on(load, model=base, sampling_model=str(folder))
    base.origin = "another"
    fit(stage, tmp_path / "restarted")
    assert (tmp_path / "own" / "selected_responses.jsonl").read_text() == (
        tmp_path / "restarted" / "selected_responses.jsonl"
    ).read_text()
    moved = max((value - before[name]).abs().max().item() for name, value in base.state_dict().items())
    assert 0 < moved < 0.05
    assert not same(weights(own), weights(stage))


def test_a_killed_run_resumes_bit_for_bit(load, tmp_path):
    whole = stage_on(load, epochs=2)
    fit(whole, tmp_path / "whole")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(stage_on(load, epochs=2), tmp_path / "killed", callbacks=[Stop(1, tmp_path / "killed")])
    (checkpoint,) = (tmp_path / "killed" / "checkpoints").glob("*.ckpt")
    resumed = stage_on(load, epochs=2)
    fit(resumed, tmp_path / "killed", resume=checkpoint)
    assert same(weights(resumed), weights(whole))
    assert resumed.final_metrics() == whole.final_metrics()


def responses_in(folder):
    return {file.name: file.read_text().splitlines() for file in sorted(folder.glob("responses.part*.jsonl"))}


def test_a_run_killed_during_sampling_resumes(load, tmp_path):
    whole = stage_on(load, batch_size=4)
    fit(whole, tmp_path / "whole")
    killed = tmp_path / "killed"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(stage_on(load, batch_size=4, sampler=dies(BestOfK(8, samples=4), 3)), killed)
    ((name, lines),) = responses_in(killed).items()
    assert len(lines) == 3 and not (killed / "best_of_k.json").exists()
    with (killed / name).open("a") as file:
        file.write(lines[0][:20])  # truncated, as by a kill during a write
    again = stage_on(load, batch_size=4, sampler=dies(BestOfK(8, samples=4), 1))  # one batch of four remains
    fit(again, killed)
    for file in ("selected_responses.jsonl", "best_of_k.json", "metrics.csv"):
        assert (killed / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert same(weights(again), weights(whole)) and again.final_metrics() == whole.final_metrics()
    assert not responses_in(killed)


def test_a_run_killed_before_its_first_checkpoint_does_not_sample_again(load, tmp_path):
    """Before the second attempt everything but the records is deleted, such as selected_responses.jsonl."""
    whole = stage_on(load)
    fit(whole, tmp_path / "whole")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(stage_on(load), tmp_path / "killed", callbacks=[Stop(0, tmp_path / "killed")])
    assert (tmp_path / "killed" / "best_of_k.json").exists() and responses_in(tmp_path / "killed")
    Run(tmp_path / "killed").clear()
    assert not (tmp_path / "killed" / "best_of_k.json").exists()
    again = stage_on(load, sampler=dies(BestOfK(8, samples=4), 0))
    fit(again, tmp_path / "killed")
    assert same(weights(again), weights(whole)) and again.final_metrics() == whole.final_metrics()


def test_two_ranks_select_the_same_responses_as_one(load, tmp_path):
    one = stage_on(load, batch_size=4)
    fit(one, tmp_path / "one")
    two = stage_on(load, batch_size=4)
    two.__class__ = Shares
    fit(two, tmp_path / "two", devices=2, strategy="ddp_fork", limit_val_batches=0)
    for file in ("selected_responses.jsonl", "best_of_k.json"):
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    shared = [json.loads((tmp_path / "two" / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert shared == [[-1, 0, 2], [1, 3]]


class Shares(RejectionSamplingStage):
    """Stage that records which batches each rank sampled."""

    def sample(self):
        file = super().sample()
        own = sorted(json.loads(line)["batch"] for line in file.path.read_text().splitlines())
        (self.run_directory / f"rank{self.trainer.global_rank}.json").write_text(json.dumps(own))
        return file


# -- hyperparameters and bad input ------------------------------------------------------------------------------------

HYPERPARAMETERS = [
    {"select": "top_overall"},
    {"select": "random_per_prompt"},
    {"select": "random_overall"},
    {"sampler": BestOfK(8, samples=2)},
    {"sampler": BestOfK(8, temperature=0.5)},
    {"sampler": BestOfK(8, temperatures=[0.5, 1.5])},
    {"epochs": 2},
    {"packing": 64, "batch_size": 4},
    {"gradient_clip": 0.01},
]


@pytest.mark.parametrize("hyperparameter", HYPERPARAMETERS, ids="-".join)
def test_every_hyperparameter_changes_the_result(load, tmp_path, hyperparameter):
    plain, moved = stage_on(load, batch_size=hyperparameter.get("batch_size", 8)), stage_on(load, **hyperparameter)
    fit(plain, tmp_path / "plain")
    fit(moved, tmp_path / "moved")
    assert not same(weights(plain), weights(moved))


def test_bad_input_is_reported_in_one_line(load, tmp_path):
    with pytest.raises(UserError, match="sampler.samples=1: best-of-K needs at least 2"):
        stage_on(load, sampler=AncestralSampler(samples=1))
    with pytest.raises(UserError, match="inputs.selected_responses=.*no selected_responses.jsonl"):
        stage_on(load, earlier=str(tmp_path))
    (tmp_path / "selected_responses.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="line 1 is not a selected response"):
        stage_on(load, earlier=str(tmp_path))


def test_every_metric_is_in_the_readme(load, tmp_path):
    import re

    from tests.conf.test_docs import unexplained

    stage = stage_on(load, sampler=BestOfK(8, samples=4, temperatures=[0.7, 1.3]))
    metrics = {*fit(stage, tmp_path), *stage.final_metrics()}
    general = {re.sub(r"_at/[\d.]+$", "_at/T", re.sub(r"gain_of_best/\d+", "gain_of_best/k", name)) for name in metrics}
    assert unexplained("rlhf_rejection_sampling", general) == set()
