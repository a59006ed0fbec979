"""Rejection sampling: what is picked, from whom, and what the best of K are worth."""

import copy
import itertools
import json
import math
from collections import Counter

import pytest
import torch

from rlhf.best_of_k import BestOfK, expected_best, interleave, kl_bound, log_law, rollout_of
from rlhf.data.records import Message, Prompt
from rlhf.diagnostics import HackingWarnings
from rlhf.errors import UserError
from rlhf.metrics_file import read_rows
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.precision import Precision
from rlhf.objective import CrossEntropy
from rlhf.rollout import Sampler
from rlhf.runs import Run
from rlhf.scoring import GoldReward
from rlhf.stage import seed_of
from rlhf.testing import tiny_model
from rlhf_rejection_sampling.picks import Candidate, key_of, pick, read_picks, worth
from rlhf_rejection_sampling.stage import RejectionSamplingStage

from .conftest import ARCHITECTURE, adamw, constant, data, dies, fit, same, weights
from .test_exactness import Stop


class Letters:
    """More letters, more points: differs between any two random replies."""

    def __call__(self, rollout):
        return torch.tensor([float(len(set(text))) for text in rollout.texts], device=rollout.mask.device)


def stage_on(load, reward=None, rollout=None, model=None, **knobs) -> RejectionSamplingStage:
    knobs = {"batch_size": 8, "epochs": 1, **knobs}
    return RejectionSamplingStage(
        model or load(),
        CrossEntropy(),
        data("prompt", 16, 8),
        reward or Letters(),
        rollout or BestOfK(8, samples=4),
        adamw,
        constant,
        **knobs,
    )


def rows_of(folder):
    return [json.loads(line) for line in (folder / "picks.jsonl").read_text().splitlines()]


# -- the numbers -----------------------------------------------------------------------------------------------------


def test_expected_best_is_the_mean_over_all_subsets():
    torch.manual_seed(0)
    scores = torch.randn(7, 5)
    best = expected_best(scores)
    assert sorted(best) == [1, 2, 4, 5]
    for k, value in best.items():
        subsets = list(itertools.combinations(range(5), k))
        plain = sum(scores[:, list(subset)].max(dim=1).values.mean().item() for subset in subsets) / len(subsets)
        assert value == pytest.approx(plain, abs=1e-6)
    assert best[1] == pytest.approx(scores.mean().item(), abs=1e-6)


def test_the_bound_on_kl():
    """log n - (n-1)/n (Beirami et al. 2024): 0 for one, exact where all scores differ and replies are many."""
    assert kl_bound(1) == 0
    assert kl_bound(8) == pytest.approx(math.log(8) - 7 / 8)
    # Best of n over m equally likely replies in order of score: P(i) = (i/m)^n - ((i-1)/m)^n.
    for n in (2, 4, 8):
        for m, slack in ((10, 0.5), (100000, 1e-3)):
            p = [(i / m) ** n - ((i - 1) / m) ** n for i in range(1, m + 1)]
            kl = sum(q * math.log(q * m) for q in p if q > 0)
            assert kl <= kl_bound(n) + 1e-9 and kl > kl_bound(n) - slack


def test_the_log_law():
    assert log_law({1: 0.0, 2: 0.3 * math.log(2), 8: 0.3 * math.log(8)}) == pytest.approx((0.3, 1.0))
    assert log_law({1: 0.0, 2: 0.0}) == (0.0, 0.0)
    # Uniform scores: E[max of k] = k/(k+1), which flattens out.
    slope, explained = log_law({k: k / (k + 1) - 0.5 for k in (1, 2, 4, 8, 16)})
    assert 0 < slope < 0.3 and explained < 0.99


# -- several temperatures --------------------------------------------------------------------------------------------


def test_replies_are_shared_out_over_the_temperatures(load):
    rollout = BestOfK(8, samples=5, temperatures=[0.0, 1.0, 1.5])
    assert rollout.spread == [0.0, 0.0, 1.0, 1.0, 1.5]
    assert not rollout.exact and BestOfK().exact
    policy, prompts = load().eval(), data("prompt", 6, 2).train
    found = rollout.sample(policy, prompts, seed=3)
    assert found.prompts == [prompt for prompt in prompts for _ in range(5)]
    greedy = Sampler(8, 0.0).sample(policy, prompts, seed=9)
    for index, text in enumerate(greedy.texts):
        assert found.texts[5 * index : 5 * index + 2] == [text, text]
    assert len({text for text in found.texts[4::5]}) > 1
    # The joined rollout is whole: scoring its tokens gives what was sampled.
    logp, _ = policy.logprobs(found.ids, found.attention_mask, found.position_ids, found.loss_mask)
    own = logp[:, -found.mask.shape[1] :]
    torch.testing.assert_close(own[2::5], found.logp[2::5], atol=1e-4, rtol=1e-4)
    assert found.texts == rollout.sample(policy, prompts, seed=3).texts


def test_interleaving_keeps_rows_together(load):
    policy, prompts = load().eval(), data("prompt", 3, 2).train
    parts = [Sampler(4, samples=2).sample(policy, prompts, 0), Sampler(8).sample(policy, prompts, 1)]
    joined = interleave(parts, 3, policy.pad_id)
    assert joined.texts[0:2] == parts[0].texts[0:2] and joined.texts[2] == parts[1].texts[0]
    assert joined.texts[3:5] == parts[0].texts[2:4] and joined.texts[8] == parts[1].texts[2]
    assert joined.mask.sum() == sum(part.mask.sum() for part in parts)


def test_more_temperatures_than_replies_are_refused():
    with pytest.raises(UserError, match="set samples=3 or more"):
        BestOfK(samples=2, temperatures=[0.5, 1.0, 1.5])


def test_written_replies_are_scored_as_sampled_ones(load):
    policy, prompts = load().eval(), data("prompt", 6, 2).train
    sampled = Sampler(12).sample(policy, prompts, 0)
    written = rollout_of(policy, sampled.prompts, sampled.texts, sampled.ended.tolist())
    assert torch.equal(GoldReward()(written), GoldReward()(sampled))
    assert written.mask.sum(1).tolist() != [0] * 6 and torch.equal(written.ended, sampled.ended)


# -- what is picked --------------------------------------------------------------------------------------------------


def candidates(scores: list[list[float]]) -> list[Candidate]:
    prompts = [Prompt((Message("user", f"q{n}"),)) for n in range(len(scores))]
    return [
        Candidate(prompt, f"r{n}{k}", True, 1.0, score)
        for n, (prompt, row) in enumerate(zip(prompts, scores, strict=True))
        for k, score in enumerate(row)
    ]


def test_selection_rules():
    found = candidates([[1, 5, 4], [2, 3, 0], [9, 8, 7]])

    def picked(select):
        return [candidate.reply for candidate in pick(found, select, 3, seed=0)]

    assert picked("best_per_prompt") == ["r01", "r11", "r20"]
    assert picked("top_overall") == ["r20", "r21", "r22"]
    assert [reply[1] for reply in picked("random_per_prompt")] == ["0", "1", "2"]
    overall = picked("random_overall")
    assert len(set(overall)) == 3 and overall == sorted(overall, key=lambda reply: reply[1])


def test_replies_of_equal_score_are_picked_alike():
    """Of a rule with two values most replies are tied: neither the first reply nor the first temperature is better."""
    draws, tops = Counter(), Counter()
    for seed in range(200):
        found = candidates([[1, 1, 0], [1, 1, 1]])
        draws.update(candidate.reply for candidate in pick(found, "best_per_prompt", 2, seed_of(seed, "pick")))
        tops.update(candidate.reply for candidate in pick(found, "top_overall", 1, seed_of(seed, "pick")))
    assert all(70 < draws[reply] < 130 for reply in ("r00", "r01")) and draws["r02"] == 0
    assert all(40 < draws[reply] < 95 for reply in ("r10", "r11", "r12"))
    assert all(20 < tops[reply] < 65 for reply in ("r00", "r01", "r10", "r11", "r12"))


def test_the_best_of_equal_score_share_what_is_said_of_temperatures():
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    found = worth(scores, [0.7, 0.7, 1.3, 1.3], candidates([[1]]))["temperatures"]
    assert found["0.7"]["share_of_best"] == pytest.approx(1 / 3)  # 1/2, 1/2 and 0
    assert found["1.3"]["share_of_best"] == pytest.approx(2 / 3)


def test_controls_are_matched_and_blind():
    """As many picks, drawn evenly: the reward does not come in."""
    found = candidates([[1, 5], [2, 3]])
    draws = Counter()
    for seed in range(200):
        draws.update(candidate.reply for candidate in pick(found, "random_per_prompt", 2, seed_of(seed, "pick")))
        assert len(pick(found, "random_overall", 2, seed)) == 2
    assert all(70 < count < 130 for count in draws.values()) and len(draws) == 4


def test_the_same_reply_twice_is_one_of_the_top():
    found = candidates([[5, 5], [4, 1]])
    found[1].reply = found[0].reply
    assert [c.reply for c in pick(found, "top_overall", 2, seed=0)] == ["r00", "r10"]


def often_ending(policy):
    """The policy with an end-of-turn that is likely: of its replies many end, and some are cut."""
    head = policy.base.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]).index_fill_(0, torch.tensor(policy.end_id), 4.0))
    return policy


def test_a_cut_reply_is_no_other_writing_of_a_whole_one():
    found = candidates([[5, 4]])
    found[1].reply, found[0].ended = found[0].reply, False
    assert [c.ended for c in pick(found, "top_overall", 2, seed=0)] == [False, True]


@pytest.mark.parametrize(
    ("how", "penalty", "treated"),
    [("auto", 1.0, lambda x: x), ("replace", 1.0, lambda x: -1.0), ("subtract", 2.5, lambda x: x - 2.5)],
)
def test_a_cut_candidate_is_picked_by_its_treated_score(how, penalty, treated, load, tmp_path, monkeypatch):
    """Of a whole reply the reward's score, of a cut one what ``missing_end`` makes of it; by default a rule's own."""
    seen = []
    monkeypatch.setattr(
        "rlhf_rejection_sampling.stage.pick", lambda found, *rest: seen.extend(found) or pick(found, *rest)
    )
    stage = stage_on(load, model=often_ending(load()), missing_end=how, missing_end_penalty=penalty)
    fit(stage, tmp_path, limit_val_batches=0)
    expected = [float(len(set(c.reply))) if c.ended else treated(float(len(set(c.reply)))) for c in seen]
    assert [c.score for c in seen] == pytest.approx(expected) and 0 < sum(c.ended for c in seen) < len(seen)
    best = [max(expected[first : first + 4]) for first in range(0, len(seen), 4)]
    assert [row["score"] for row in rows_of(tmp_path)] == pytest.approx(best)
    assert stage.final_metrics()["reward_picked"] == pytest.approx(sum(best) / len(best))


def test_cut_picks_are_trained_on_without_an_end(load, tmp_path):
    stage = stage_on(load, model=often_ending(load()))
    policy = stage.policy
    fit(stage, tmp_path, limit_val_batches=0)
    ended = [row["ended"] for row in rows_of(tmp_path) if row["reply"]]
    rows = [*stage.held_out, *stage.examples]
    assert 0 < sum(ended) < len(ended) == len(rows)
    assert [row.ids[-1] == policy.end_id and row.mask[-1] for row in rows] == ended
    everything = [row["ended"] for row in rows_of(tmp_path)]
    assert stage.final_metrics()["cut_share"] == pytest.approx(everything.count(False) / len(everything))


def test_the_best_are_picked_and_trained_on(load, tmp_path, figures):
    stage = stage_on(load)
    fit(stage, tmp_path)
    found = json.loads((tmp_path / "best_of_k.json").read_text())
    metrics = stage.final_metrics()
    assert metrics["reward_picked"] == pytest.approx(metrics["reward_best"])
    assert metrics["reward_best"] > metrics["reward_mean"]
    assert metrics["best_of_k_gain"] == pytest.approx(found["gain_by_k"]["4"])
    assert metrics["kl_bound"] == pytest.approx(math.log(4) - 3 / 4)
    assert metrics["gain_of_best/2"] < metrics["gain_of_best/4"]
    assert metrics["val/score_gain"] == pytest.approx(metrics["val/score"] - metrics["val/score_before"])
    assert len(rows_of(tmp_path)) == 16 and read_rows(tmp_path / "metrics.csv")
    assert (tmp_path / "best_of_k.png").read_bytes().startswith(b"\x89PNG")


def in_leaps(parameters):
    """An optimizer that takes the policy somewhere else."""
    return torch.optim.AdamW(parameters, lr=2e-2)


def drawn():
    """A model whose weights are drawn: there is nothing to read again."""
    torch.manual_seed(5)
    return CausalLM(None, ARCHITECTURE, 320).load(NoAdapter(), Precision("32-true"), data("demonstration", 200).texts)


def log_softmax_of_all(model, rollout):
    """Log-probabilities [B, R] of the replies' tokens the plain way: one row at a time, all logits."""
    found = torch.zeros(rollout.mask.shape)
    for row in range(len(rollout.texts)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        reply = rollout.response_ids[row][rollout.mask[row]]
        logits = model.model(input_ids=torch.cat([prompt, reply])[None]).logits[0].double()
        logp = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, reply[:, None])[:, 0]
        found[row, : len(reply)] = logp.float()
    return found


@pytest.mark.parametrize("who", ["itself", "itself with lora", "itself, drawn", "another"])
def test_kl_is_that_of_the_two_models_on_the_replies(load, folder, tmp_path, who):
    model = drawn() if "drawn" in who else load(lora="lora" in who)
    before = copy.deepcopy(model).eval()
    if who == "another":  # the policy starts elsewhere; who sampled is what lies in the folder
        model.origin = "elsewhere"
        with torch.no_grad():
            model.base.get_output_embeddings().weight.mul_(1.1)
    stage = stage_on(load, model=model, sampler=str(folder) if who == "another" else None, epochs=3, micro_batch_size=3)
    assert (stage.start is not None) == ("drawn" in who)  # all else can be read again
    stage._optimizer = in_leaps
    fit(stage, tmp_path)
    after = stage.policy.eval()
    with torch.no_grad():
        replies = stage.answers(after)
        logp, ref_logp = (log_softmax_of_all(one, replies) for one in (after, before))
    ratio = (logp - ref_logp) * replies.mask
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


def test_kl_is_watched(load, tmp_path, capsys):
    watch = HackingWarnings(None, None, None, None, None, 1e-6, None)
    stage = stage_on(load, epochs=3)
    stage._optimizer = in_leaps
    fit(stage, tmp_path, callbacks=[watch])
    assert watch.said == ["kl"] and "nats per reply from its reference" in capsys.readouterr().out


def test_kl_from_a_sampler_of_other_tokens_is_not_made_up(load, tmp_path, capsys):
    tiny_model(("Where does Amy live?", "Amy lives in Bath.")).save(tmp_path / "other")
    stage = stage_on(load, sampler=str(tmp_path / "other"))
    fit(stage, tmp_path / "run")
    assert "val/kl is not measured" in capsys.readouterr().out
    assert "val/score" in stage.final_metrics() and "val/kl" not in stage.final_metrics()


def test_a_random_pick_is_worth_the_mean(load, tmp_path):
    stage = stage_on(load, rollout=BestOfK(8, samples=16), select="random_overall")
    fit(stage, tmp_path)
    metrics = stage.final_metrics()
    assert abs(metrics["reward_picked"] - metrics["reward_mean"]) < 0.5 * metrics["best_of_k_gain"]


def test_each_temperature_is_reported(load, tmp_path):
    stage = stage_on(load, rollout=BestOfK(8, samples=4, temperatures=[0.7, 1.3]))
    fit(stage, tmp_path)
    metrics = stage.final_metrics()
    assert metrics["share_of_best_at/0.7"] + metrics["share_of_best_at/1.3"] == pytest.approx(1)
    mean = (metrics["reward_mean_at/0.7"] + metrics["reward_mean_at/1.3"]) / 2
    assert mean == pytest.approx(metrics["reward_mean"], abs=1e-5)
    assert {row["temperature"] for row in rows_of(tmp_path)} <= {0.7, 1.3}


# -- earlier rounds, and the base ------------------------------------------------------------------------------------


def test_best_samples_of_earlier_rounds_are_kept_or_not(load, tmp_path):
    """They are scored anew beside the fresh replies, so a prompt still has one pick."""
    fit(stage_on(load, rollout=BestOfK(8, samples=12)), tmp_path / "first")
    earlier = [str(tmp_path / "first")]
    results = {}
    for keep in (True, False):
        stage = stage_on(load, rollout=BestOfK(8, samples=2), earlier=earlier, keep_earlier=keep)
        fit(stage, tmp_path / str(keep))
        results[keep] = (stage.final_metrics(), rows_of(tmp_path / str(keep)), weights(stage))
    kept, fresh = results[True], results[False]
    assert kept[0]["earlier_share"] > 0.4 and fresh[0]["earlier_share"] == 0
    assert kept[0]["reward_picked"] > fresh[0]["reward_picked"]
    assert kept[0]["reward_best"] == fresh[0]["reward_best"]  # of this round's replies alone
    assert len(kept[1]) == len(fresh[1]) == 16
    assert not same(kept[2], fresh[2])
    texts = {(key_of(c.prompt), c.reply) for c in read_picks(earlier[0])}
    for row in kept[1]:
        if row["temperature"] is None:
            assert (key_of(Prompt.from_json(row)), row["reply"]) in texts


def test_picks_of_a_prompt_that_is_not_asked_again_stay(load, tmp_path):
    file = tmp_path / "picks.jsonl"
    prompt = Prompt((Message("user", "something else"),))
    file.write_text(json.dumps({**prompt.to_json(), "reply": "old"}) + "\n")
    stage = stage_on(load, earlier=str(file))
    fit(stage, tmp_path / "run")
    assert [row["reply"] for row in rows_of(tmp_path / "run")][-1] == "old"
    assert len(rows_of(tmp_path / "run")) == 17


def test_another_model_samples_than_is_trained(load, folder, tmp_path):
    """Restart from the base: the picks are those of the sampler, the weights those of the base."""
    own = stage_on(load)
    fit(own, tmp_path / "own")
    base = load()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    stage = stage_on(load, model=base, sampler=str(folder))
    base.origin = "another"
    fit(stage, tmp_path / "restarted")
    assert (tmp_path / "own" / "picks.jsonl").read_text() == (tmp_path / "restarted" / "picks.jsonl").read_text()
    moved = max((value - before[name]).abs().max().item() for name, value in base.state_dict().items())
    assert 0 < moved < 0.05
    assert not same(weights(own), weights(stage))


def test_a_killed_run_ends_with_the_same_bits(load, tmp_path):
    whole = stage_on(load, epochs=2)
    fit(whole, tmp_path / "whole")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(stage_on(load, epochs=2), tmp_path / "killed", callbacks=[Stop(1, tmp_path / "killed")])
    (checkpoint,) = (tmp_path / "killed" / "checkpoints").glob("*.ckpt")
    resumed = stage_on(load, epochs=2)
    fit(resumed, tmp_path / "killed", resume=checkpoint)
    assert same(weights(resumed), weights(whole))
    assert resumed.final_metrics() == whole.final_metrics()


def replies_in(folder):
    return {file.name: file.read_text().splitlines() for file in sorted(folder.glob("replies.part*.jsonl"))}


def test_a_run_killed_while_it_samples_goes_on(load, tmp_path):
    whole = stage_on(load, batch_size=4)
    fit(whole, tmp_path / "whole")
    killed = tmp_path / "killed"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(stage_on(load, batch_size=4, rollout=dies(BestOfK(8, samples=4), 3)), killed)
    ((name, lines),) = replies_in(killed).items()
    assert len(lines) == 3 and not (killed / "best_of_k.json").exists()
    with (killed / name).open("a") as file:
        file.write(lines[0][:20])  # cut short, as by a kill in mid-write
    again = stage_on(load, batch_size=4, rollout=dies(BestOfK(8, samples=4), 1))  # one batch of four is left
    fit(again, killed)
    for file in ("picks.jsonl", "best_of_k.json", "metrics.csv"):
        assert (killed / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert same(weights(again), weights(whole)) and again.final_metrics() == whole.final_metrics()
    assert not replies_in(killed)


def test_a_run_killed_before_its_first_checkpoint_does_not_sample_again(load, tmp_path):
    """What is cleared before the second attempt is all but the records: picks.jsonl stays, best_of_k.json does not."""
    whole = stage_on(load)
    fit(whole, tmp_path / "whole")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(stage_on(load), tmp_path / "killed", callbacks=[Stop(0, tmp_path / "killed")])
    assert (tmp_path / "killed" / "best_of_k.json").exists() and replies_in(tmp_path / "killed")
    Run(tmp_path / "killed").clear()
    assert not (tmp_path / "killed" / "best_of_k.json").exists()
    again = stage_on(load, rollout=dies(BestOfK(8, samples=4), 0))
    fit(again, tmp_path / "killed")
    assert same(weights(again), weights(whole)) and again.final_metrics() == whole.final_metrics()


def test_two_processes_pick_what_one_picks(load, tmp_path):
    one = stage_on(load, batch_size=4)
    fit(one, tmp_path / "one")
    two = stage_on(load, batch_size=4)
    two.__class__ = Shares
    fit(two, tmp_path / "two", devices=2, strategy="ddp_fork", limit_val_batches=0)
    for file in ("picks.jsonl", "best_of_k.json"):
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    shared = [json.loads((tmp_path / "two" / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert shared == [[-1, 0, 2], [1, 3]]


class Shares(RejectionSamplingStage):
    """Writes down which batches each process sampled."""

    def sample(self):
        file = super().sample()
        own = sorted(json.loads(line)["batch"] for line in file.path.read_text().splitlines())
        (self.run_folder / f"rank{self.trainer.global_rank}.json").write_text(json.dumps(own))
        return file


# -- knobs and bad input ---------------------------------------------------------------------------------------------

KNOBS = [
    {"select": "top_overall"},
    {"select": "random_per_prompt"},
    {"select": "random_overall"},
    {"rollout": BestOfK(8, samples=2)},
    {"rollout": BestOfK(8, temperature=0.5)},
    {"rollout": BestOfK(8, temperatures=[0.5, 1.5])},
    {"epochs": 2},
    {"packing": 64, "batch_size": 4},
    {"gradient_clip": 0.01},
]


@pytest.mark.parametrize("knob", KNOBS, ids="-".join)
def test_every_knob_moves_the_result(load, tmp_path, knob):
    plain, moved = stage_on(load, batch_size=knob.get("batch_size", 8)), stage_on(load, **knob)
    fit(plain, tmp_path / "plain")
    fit(moved, tmp_path / "moved")
    assert not same(weights(plain), weights(moved))


def test_bad_input_is_one_line(load, tmp_path):
    with pytest.raises(UserError, match="rollout.samples=1: the best of one"):
        stage_on(load, rollout=Sampler(samples=1))
    with pytest.raises(UserError, match="inputs.picks=.*no picks.jsonl"):
        stage_on(load, earlier=str(tmp_path))
    (tmp_path / "picks.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="line 1 is no pick"):
        stage_on(load, earlier=str(tmp_path))


def test_every_metric_is_in_the_readme(load, tmp_path):
    import re

    from tests.conf.test_docs import unexplained

    stage = stage_on(load, rollout=BestOfK(8, samples=4, temperatures=[0.7, 1.3]))
    metrics = {*fit(stage, tmp_path), *stage.final_metrics()}
    general = {re.sub(r"_at/[\d.]+$", "_at/T", re.sub(r"gain_of_best/\d+", "gain_of_best/k", name)) for name in metrics}
    assert unexplained("rlhf_rejection_sampling", general) == set()
