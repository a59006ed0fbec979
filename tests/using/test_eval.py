"""Measurements against closed forms: perplexity, its error, wins in both orders, exact zeros for the same policy."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.annotator.judge import JudgeAnnotator
from rlhf.cli.eval import _over_runs
from rlhf.data.records import Demonstration, Message, Prompt, Text
from rlhf.evaluation.compare import load_policy
from rlhf.evaluation.measuring import Measured
from rlhf.evaluation.perplexity import Likelihood, response_likelihood, text_likelihood
from rlhf.evaluation.wins import Judge, by_scores
from rlhf.functional.statistics import estimate, paired
from rlhf.models.language_model import LanguageModel
from rlhf.reward.model import ModelReward
from rlhf.sampler.best_of_k import build_rollout

Typed = Callable[..., tuple[int, str]]
TEXTS = ["Anna has four dogs.", "Two plus two is four, of course. " * 12, "Good bye."]


@pytest.fixture(scope="module")
def model(outputs: Path) -> LanguageModel:
    return load_policy(outputs / "sft" / "none0" / "model")


def test_perplexity_equals_that_of_plain_transformers(outputs: Path, model: LanguageModel) -> None:
    folder = outputs / "sft" / "none0" / "model"
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    nats, count = 0.0, 0
    for text in TEXTS[::2]:  # the middle one is longer than the context
        ids = torch.tensor([[*tokenizer(text, add_special_tokens=False)["input_ids"], end]])  # as in training
        with torch.no_grad():
            loss = plain(input_ids=ids, labels=ids).loss.item()
        nats, count = nats + loss * (ids.shape[1] - 1), count + ids.shape[1] - 1
    found = text_likelihood(model, [Text(text) for text in TEXTS[::2]])
    assert sum(found.tokens) == count
    assert estimate(found.perplexity()).mean == pytest.approx(math.exp(nats / count), rel=1e-4)
    size = sum(len(text) for text in TEXTS[::2])
    assert estimate(found.bits_per_byte()).mean == pytest.approx(nats / math.log(2) / size, rel=1e-4)


def test_every_token_of_a_long_text_is_predicted_once(model: LanguageModel) -> None:
    found = text_likelihood(model, [Text(text) for text in TEXTS])
    tokens = [len(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    assert found.tokens == tokens and tokens[1] > model.context_length
    assert found.bytes == [len(text) for text in TEXTS]


def test_only_the_responses_of_a_dialogue_count(model: LanguageModel) -> None:
    turns = (Message("user", "Hello"), Message("assistant", "Good day to you."))
    (likely,) = response_likelihood(model, [Demonstration(turns)]).nats
    (other,) = response_likelihood(model, [Demonstration((turns[0], Message("assistant", "Anna.")))]).nats
    assert likely < 3 < other  # what it has learnt, and what it has not
    long = Demonstration((*turns, *(Message("user", "Who? " * 40), Message("assistant", "Anna."))))
    found = response_likelihood(model, [long])
    assert found.cut == 1 and found.nats[0] == pytest.approx(likely, abs=1e-4)
    # Of an answer that was cut off the end of turn, which nobody wrote, does not count.
    whole, cut = (response_likelihood(model, [Demonstration(turns, ended)]) for ended in (True, False))
    assert cut.tokens[0] == whole.tokens[0] - 1 and cut.nats[0] < whole.nats[0]


def test_the_error_of_perplexity_equals_that_of_the_jackknife() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 60, (80,), generator=generator).tolist()
    nats = [n * (1 + 0.3 * torch.randn(1, generator=generator).item()) for n in tokens]
    found = estimate(Likelihood(nats, tokens, tokens).perplexity())
    whole = math.exp(sum(nats) / sum(tokens))
    assert found.mean == pytest.approx(whole)
    left = [math.exp((sum(nats) - x) / (sum(tokens) - n)) for x, n in zip(nats, tokens, strict=True)]
    middle = sum(left) / len(left)
    jackknife = math.sqrt((len(left) - 1) / len(left) * sum((value - middle) ** 2 for value in left))
    assert found.se == pytest.approx(jackknife, rel=0.05)


class Stub(JudgeAnnotator):
    """Judge whose answers are a function of the responses."""

    def __init__(self, rule: Callable[[str, str], float | None]) -> None:
        self.template, self.rule = "{first}|{second}", rule

    def ask(self, questions: Sequence[str], told: Callable[[int], None]) -> list[Any]:
        told(len(questions))
        return [(self.rule(*question.split("|")), "") for question in questions]


@pytest.mark.parametrize(
    ("rule", "expected", "same"),
    [
        (lambda a, b: float(len(a) - len(b)), [1.0, 0.0, 0.5], 0),  # the longer one, in either position
        (lambda a, b: 1.0, [0.5, 0.5, 0.5], 2),  # always the first: no preference
        (lambda a, b: 1.0 if a == "long" else None, [0.5, 0.5, 0.5], 0),  # unreadable in one of the orders
    ],
)
def test_a_judge_must_prefer_a_response_in_both_orders(rule: Any, expected: list[float], same: int) -> None:
    judge = Judge.__new__(Judge)
    judge._judge, judge.asked, judge.same_place = Stub(rule), 0, 0
    prompts = [Prompt((Message("user", "x"),))] * 3
    assert judge(prompts, ["long", "a", "same"], ["b", "longer", "same"]) == expected
    assert (judge.asked, judge.same_place) == (2, same)  # equal responses are not judged


def test_wins_count_ties_half() -> None:
    wins = by_scores([1.0, 2.0, 2.0, 0.0], [0.0, 2.0, 3.0, 0.0])
    assert wins == [1.0, 0.5, 0.0, 0.5]
    assert estimate(wins).mean == paired([0.0, 2.0, 3.0, 0.0], [1.0, 2.0, 2.0, 0.0]).wins == 0.5


def test_policies_are_compared_side_by_side(rlhf: Typed, outputs: Path) -> None:
    one, other = outputs / "sft" / "lora0", outputs / "sft" / "none0"
    status, out = rlhf("eval", one, other, "--against", other, "--reward-model", outputs / "reward_model" / "b0",
                       "--limit", 12, "--max-new-tokens", 8, "--batch-size", 5, "--text", "testbed")  # fmt: skip
    assert status == 0 and "12 prompts of testbed" in out and str(one / "eval.json") in out and "Next:" in out, out
    (mine,) = json.loads((one / "eval.json").read_text())["evaluations"]
    (its,) = json.loads((other / "eval.json").read_text())["evaluations"]
    measured = {"gold", "reward", "kl", "length", "ended", "perplexity_text", "bits_per_byte_text"}
    assert measured | {"win_gold", "win_reward"} <= set(mine["metrics"])
    assert measured <= set(its["metrics"]) and "win_gold" not in its["metrics"] and its["differences"] == {}
    for name in ("length", "reward", "bits_per_byte_text"):
        gap = mine["metrics"][name]["mean"] - its["metrics"][name]["mean"]
        assert mine["differences"][name]["mean"] == pytest.approx(gap)
    assert mine["metrics"]["win_reward"]["mean"] == pytest.approx(mine["differences"]["reward"]["wins"])
    assert all(value["se"] is not None and value["count"] <= 12 for value in mine["metrics"].values())
    assert mine["settings"]["reference"] == str(outputs / "pretrain" / "a0" / "model")
    # The same responses as those of rlhf generate, at any batch size.
    assert (
        rlhf("generate", one, "--prompts", "testbed", "--limit", 12, "--max-new-tokens", 8, "--out", "r.jsonl")[0] == 0
    )
    rows = [json.loads(line) for line in Path("r.jsonl").read_text().splitlines()]
    assert [row["response"] for row in rows[:3]] == [sample["response"] for sample in mine["samples"]]
    assert sum(row["tokens"] for row in rows) / 12 == pytest.approx(mine["metrics"]["length"]["mean"])


def test_the_mean_over_runs_has_an_interval_over_runs_and_prompts() -> None:
    """Differences of 1, 2 and 3 at every prompt: the interval is that of the runs, whose mean is 2."""
    prompts = [Prompt((Message("user", str(i)),)) for i in range(8)]
    rollouts = [SimpleNamespace(prompts=prompts)]
    base, *runs = (
        Measured(str(gain), "", rollouts, [], {}, {"gold": [gain + i for i in range(8)], "kl": [0.0] * 8})  # type: ignore[arg-type]
        for gain in (0.0, 1.0, 2.0, 3.0)
    )
    ((label, mean, interval),) = _over_runs([base, *runs], base)
    assert (label, mean, interval) == ("gold reward", "+2.000", "+1.000 to +3.000")


def test_the_best_of_n_is_measured_as_a_policy(rlhf: Typed, outputs: Path) -> None:
    """Against the best of each prompt's responses, sampled and scored apart."""
    run, scorer = outputs / "sft" / "none0", outputs / "reward_model" / "b0"
    options = ["--limit", 6, "--max-new-tokens", 8]
    status, out = rlhf("eval", run, "--reward-model", scorer, "--best-of", 4, "--batch-size", 5, *options)
    assert status == 0 and "Best of n of" in out and "ranked by the reward model" in out, out
    one, two, four = json.loads((run / "eval.json").read_text())["evaluations"][-1]["best_of_n"]
    assert [one["n"], two["n"], four["n"]] == [1, 2, 4]
    assert one["kl"]["mean"] == one["kl_bound"] == 0 and two["kl"]["mean"] < four["kl"]["mean"]
    assert four["kl_bound"] == pytest.approx(math.log(4) - 3 / 4)
    rlhf("generate", run, "--prompts", "testbed", "--samples", 4, "--out", "best.jsonl", *options)
    rows = [json.loads(line) for line in Path("best.jsonl").read_text().splitlines()]
    prompts = [
        Prompt(tuple(Message(**turn) for turn in row["messages"][:-1]), tuple(row.get("tags", ()))) for row in rows
    ]
    policy = load_policy(run / "model")
    scores = ModelReward(str(scorer))(
        build_rollout(policy, prompts, [row["response"] for row in rows], [row["ended"] for row in rows])
    ).view(6, 4)
    lengths = torch.tensor([float(row["tokens"]) for row in rows]).view(6, 4)
    assert four["metrics"]["reward"]["mean"] == pytest.approx(scores.amax(dim=1).mean().item(), abs=1e-4)
    assert one["metrics"]["reward"]["mean"] == pytest.approx(scores.mean().item(), abs=1e-4)
    assert four["metrics"]["length"]["mean"] == pytest.approx(
        lengths.gather(1, scores.argmax(dim=1, keepdim=True)).mean().item()
    )
    assert "gold" in four["metrics"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--best-of", 1], "greater than or equal to 2"),
        (["--best-of", 4, "--temperature", 0], "equal responses"),
        (["--best-of", 4, "--prompts", "p.txt"], "type --reward-model RUN"),
    ],
)
def test_the_best_of_n_needs_a_choice(rlhf: Typed, outputs: Path, words: list[Any], line: str) -> None:
    status, out = rlhf("eval", outputs / "sft" / "none0", *words)
    assert status == 2 and line in out, out


def test_a_policy_compared_with_itself_has_no_difference(rlhf: Typed, outputs: Path) -> None:
    from rlhf.evaluation.measuring import Task, add_kl, measure

    Path("p.txt").write_text("Hello\nWho?\nWhy?\n")
    path = str(outputs / "sft" / "none0" / "model")
    task = Task([Prompt((Message("user", text),)) for text in ("Hello", "Who?", "Why?")], max_new_tokens=8)
    one, other = measure("one", path, task), measure("other", path, task)
    add_kl([one], path, task)
    assert max(map(abs, one.values["kl"])) < 1e-5
    assert one.texts == other.texts and one.values["length"] == other.values["length"]
    run = outputs / "sft" / "qlora0"
    status, out = rlhf("eval", run, "--prompts", "p.txt", "--max-new-tokens", 8, "--reference", run)
    assert status == 0, out
    (found,) = json.loads((run / "eval.json").read_text())["evaluations"]
    assert found["metrics"]["kl"]["mean"] == pytest.approx(0, abs=1e-5)
    assert rlhf("eval", run, "--prompts", "p.txt", "--max-new-tokens", 8, "--reference", run)[0] == 0
    assert len(json.loads((run / "eval.json").read_text())["evaluations"]) == 1  # the same question: one answer


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("reward_model/b0",), "is a reward or value model, which generates no text; type a run of a policy"),
        (("sft/none0", "--reward-model", "sft/none0"), "is not a reward model; type a run of stage=reward_model"),
        (("sft/none0", "--judge", "nobody"), "--judge nobody: no such run"),
        (("sft/none0", "--judge", "sft/none0"), "type --against RUN"),
        (("sft/none0", "--against", "sft/lora0", "--prompts", "p.txt"), "type --reward-model RUN or --judge MODEL"),
        (("sft/none0", "--text", "nothing.txt"), "--text nothing.txt: no such file"),
        (("sft/none0/model",), None),
    ],
)
def test_a_mistake_is_reported_in_one_line_with_status_2(
    rlhf: Typed, outputs: Path, words: tuple[str, ...], said: str | None, tmp_path: Path
) -> None:
    Path("p.txt").write_text("Who?\n")
    typed = [str(outputs / word) if (outputs / word).exists() else word for word in words]
    if said is None:  # a model that no run of rlhf wrote: its evaluation data is unknown
        foreign = tmp_path / "foreign"
        foreign.mkdir()
        for file in (outputs / "sft" / "none0" / "model").iterdir():
            (foreign / file.name).write_bytes(file.read_bytes())
        typed, said = [str(foreign)], "type --prompts FILE"
    status, out = rlhf("eval", *typed)
    assert status == 2 and said in out and "Traceback" not in out, out
