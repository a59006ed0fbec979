"""Repeated steps: their names, their inputs, and overrides for one round or for all."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from rlhf.errors import UserError
from rlhf.planning import rounds
from rlhf.planning.plan import plan
from rlhf.planning.step import Plan
from rlhf.running.build import derive_step_seed

Typed = Callable[..., DictConfig]

ROUNDS = """
# @package _global_
defaults: [{/stage@sft: sft}, {/stage@collect: collect}, {/stage@reward_model: reward_model}, {/stage@best: dpo},
  {/stage@align: ppo}, {/data@compare.data: prompts}, _self_]
steps: [sft, collect, reward_model, best, align]
repeat: [collect, reward_model, best]
rounds: 2
collect: {inputs: {policy: "${previous_round:best,sft}"}}
reward_model: {inputs: {policy: "${previous_round:best,sft}", comparisons: "${all_rounds:collect}"}}
best: {inputs: {policy: "${previous_round:best,sft}", comparisons: "${artifact:collect}"}}
align: {inputs: {policy: "${artifact:best}", reward_model: "${artifact:reward_model}"}}
compare: {before: sft, after: align, reward_model: reward_model}
"""


@pytest.fixture(autouse=True)
def pipeline(conf: Path) -> None:
    (conf / "pipeline" / "rounds.yaml").write_text(ROUNDS)


def planned(typed: Typed, *overrides: str) -> Plan:
    words = ("pipeline=rounds", *overrides)
    return plan(typed(*words), words)


def names(found: Plan) -> list[str]:
    return [step.name for step in found.steps]


def read_by(found: Plan) -> dict[str, dict[str, list[str]]]:
    """Return step -> role -> the steps it reads in that role."""
    known = {step.fingerprint: step.name for step in found.steps}
    return {s.name: {role: [known[one] for one in ones] for role, ones in s.inputs.items()} for s in found.steps}


def test_the_number_of_rounds_is_one_override(typed: Typed) -> None:
    one = ["sft", "collect_1", "reward_model_1", "best_1", "align"]
    assert sorted(names(planned(typed, "rounds=1"))) == sorted(one)
    three = planned(typed, "rounds=3")
    assert len(three.steps) == 1 + 3 * 3 - 2 + 1  # only the last reward model is read
    assert set(three.skipped) == {"reward_model_1", "reward_model_2"}


def test_each_round_reads_the_newest_policy_and_all_comparisons_so_far(typed: Typed) -> None:
    found = read_by(planned(typed, "rounds=3"))
    assert found["collect_1"] == {"policy": ["sft"]}
    assert found["collect_3"] == {"policy": ["best_2"]}
    assert found["best_2"] == {"policy": ["best_1"], "comparisons": ["collect_2"]}
    assert found["reward_model_3"] == {"policy": ["best_2"], "comparisons": ["collect_1", "collect_2", "collect_3"]}
    assert found["align"] == {"policy": ["best_3"], "reward_model": ["reward_model_3"]}


def test_a_list_of_runs_is_passed_to_the_data(typed: Typed) -> None:
    found = planned(typed, "rounds=2")
    reward, first, second = found.get("reward_model_2"), found.get("collect_1"), found.get("collect_2")
    assert reward and first and second
    assert reward.config["data"]["source"] == [str(first.folder), str(second.folder)]
    assert {first.folder, second.folder} <= set(reward.parents.values())


def test_more_rounds_do_not_change_the_earlier_ones(typed: Typed) -> None:
    two = {step.name: step.fingerprint for step in planned(typed, "rounds=2").steps}
    three = {step.name: step.fingerprint for step in planned(typed, "rounds=3").steps}
    shared = ["sft", "collect_1", "best_1", "collect_2", "best_2"]
    assert [two[name] for name in shared] == [three[name] for name in shared]


def test_the_round_counts_the_runs_of_a_stage_in_its_lineage(typed: Typed) -> None:
    found = {step.name: step.config["round"] for step in planned(typed, "rounds=3").steps}
    assert [found[f"collect_{n}"] for n in (1, 2, 3)] == [found[f"best_{n}"] for n in (1, 2, 3)] == [1, 2, 3]
    assert [found[name] for name in ("sft", "reward_model_3", "align")] == [1, 1, 1]  # the first of their stages


def test_parallel_steps_of_one_stage_have_different_seeds(typed: Typed) -> None:
    """The reward models of three rounds are not each other's ancestors: all are the first of their lineage."""
    models = [planned(typed, "rounds=3", f"until=reward_model_{n}").steps[-1].config for n in (1, 2, 3)]
    assert [(one["round"], one.get("branch", 1)) for one in models] == [(1, 1), (1, 2), (1, 3)]
    whole = {step.name: step.config for step in planned(typed, "rounds=3").steps}
    assert whole["reward_model_3"] == models[2]  # wherever the pipeline stops
    assert all("branch" not in whole[f"collect_{n}"] for n in (1, 2, 3))  # each has the one before as ancestor
    seeds = {derive_step_seed(OmegaConf.create(config)) for config in (*models[:2], *whole.values())}
    assert len(seeds) == len(whole) + 2


def test_hyperparameters_do_not_change_the_round(typed: Typed) -> None:
    plain, other = planned(typed, "rounds=2"), planned(typed, "rounds=2", "collect.sampler.temperature=2", "seed=3")
    assert [step.config["round"] for step in plain.steps] == [step.config["round"] for step in other.steps]


def test_a_single_stage_continues_the_rounds_of_its_input(typed: Typed, train) -> None:
    from rlhf.running.pipeline import run

    words = ["pipeline=rounds", "rounds=1", "until=best"]
    run(typed(*words), words)
    newest = train.folders["dpo"]
    single = ["stage=collect", f"inputs.policy={newest}"]
    two = {step.name: step for step in planned(typed, "rounds=2").steps}
    found = plan(typed(*single), single).steps[0]
    assert found.config["round"] == 2
    assert found.fingerprint == two["collect_2"].fingerprint  # the same run as that of the second round


def test_overrides_apply_to_all_rounds_or_to_a_single_round(typed: Typed) -> None:
    found = planned(typed, "rounds=3", "collect.sampler.temperature=2", "++collect_2.sampler.temperature=3")
    temperatures = [step.config["sampler"]["temperature"] for step in found.steps if step.stage == "collect"]
    assert temperatures == [2, 3, 2]
    assert found.notes == []


def test_one_round_may_have_another_option_or_stage(typed: Typed) -> None:
    other = planned(typed, "+objective@best_1.objective=ipo").get("best_1")
    assert other and other.config["objective"]["_target_"].endswith("IPO")
    swapped = planned(typed, "+stage@best_2=rejection_sampling", "++best_2.inputs.reward_model=org/name")
    step = swapped.get("best_2")
    assert step and step.stage == "rejection_sampling" and read_by_roles(step.inputs) == {"policy", "reward_model"}


def read_by_roles(inputs: dict[str, list[str]]) -> set[str]:
    return set(inputs)


def test_until_names_a_round_or_the_last_one(typed: Typed) -> None:
    assert names(planned(typed, "rounds=3", "until=collect_2"))[-1] == "collect_2"
    assert names(planned(typed, "rounds=3", "until=collect"))[-1] == "collect_3"


def test_compare_uses_the_last_round(typed: Typed) -> None:
    assert (planned(typed, "rounds=2").compare or {})["reward_model"] == "reward_model_2"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rounds=0"], "rounds=0: must be a whole number from 1 to 100; type rounds=3"),
        (["rounds=two"], "rounds=two: must be a whole number"),
        (["++collect_9.sampler.temperature=1"], "collect_9: no such round, rounds=2; type collect_2 or rounds=9"),
        (["++collect_2.sampler.temprature=1"], "collect_2.sampler.temprature: unknown option .did you mean"),
        (["repeat=[colect]"], r"repeat: names colect, which is not a step .did you mean collect\?"),
        (["align.inputs.policy='${all_rounds:sft}'"], "align: reads .*all_rounds:sft.*sft is not repeated"),
        (
            ["align.inputs.policy='${previous_round:best}'"],
            "align: reads .*, which only a repeated step can read; type .*artifact:best",
        ),
        (["+collect.inputs.reward_model=org/name"], "collect.inputs.reward_model=org/name: has no effect"),
        (["+collect.optimizer.lr=1"], "the stage of collect does not read optimizer"),
        (["+collect.nosuch=1"], "nothing reads collect.nosuch; leave it out"),
        (["until=collekt"], "until=collekt: no such step"),
    ],
)
def test_invalid_rounds_are_refused(typed: Typed, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        planned(typed, *overrides)


def test_a_round_in_a_pipeline_without_rounds_is_refused(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_pipelines", lambda: [OmegaConf.create({"repeat": ["collect"]})])
    words = ("pipeline=dpo", "++collect_2.sampler.temperature=1")
    with pytest.raises(
        UserError, match="collect_2: is a round of a step, and this config repeats no step; leave it out"
    ):
        plan(typed(*words), words)


def test_a_pipeline_without_rounds_is_unchanged(typed: Typed) -> None:
    root = typed("pipeline=dpo")
    assert rounds.expand(root) == (root, {})


def test_named_weights_are_the_base(typed: Typed) -> None:
    words = ("pipeline=dpo", "align.inputs.policy='${base_weights:pretrain}'")
    for model, expected in (("tiny", None), ("hub", "org/name")):
        step = plan(typed(*words, f"model={model}"), words).get("align")
        assert step
        path = step.config["model"]["path"]
        assert path == expected if expected else path.startswith("outputs/pretrain/")


def test_overrides_of_a_single_round_are_added_to_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_pipelines", lambda: [OmegaConf.create({"repeat": ["collect", "reward_model"]})])
    assert rounds.mark_round_overrides(
        [
            "pipeline=x",
            "collect_2.sampler.samples=4,8",
            "reward_model_1.stage.epochs=2",
            "annotator@collect_2.annotator=reward",
            "stage@reward_model_12=y",
            "other_2.x=1",
            "++collect_2.x=1",
            "model=smollm2_135m",
            "-m",
        ]
    ) == [
        "pipeline=x",
        "++collect_2.sampler.samples=4,8",
        "++reward_model_1.stage.epochs=2",
        "+annotator@collect_2.annotator=reward",
        "+stage@reward_model_12=y",
        "other_2.x=1",
        "++collect_2.x=1",
        "model=smollm2_135m",
        "-m",
    ]


class Tables:
    """Fake of the console's tables, which fold long cells."""

    def __init__(self) -> None:
        self.rows: dict[str, list] = {}

    def __call__(self, title: str, columns: list, rows: list) -> None:
        self.rows[title.partition(",")[0]] = list(rows)


def test_the_table_of_runs_shows_the_inputs_of_each_step(typed: Typed, train, compared, monkeypatch) -> None:
    from rlhf.running import pipeline

    console = Tables()
    monkeypatch.setattr(pipeline.console, "print_table", console)
    pipeline.run(typed("pipeline=rounds", "rounds=2"), ["pipeline=rounds", "rounds=2"])
    rows = console.rows["Runs"]
    assert [row[-1] for row in rows if row[0] == "reward_model_2"] == ["collect_1, best_1, collect_2"]
    found = planned(typed, "rounds=2").get("align")
    assert found
    lineage = json.loads((found.folder / "lineage.json").read_text())
    stages = sorted(one["stage"] for one in lineage["ancestors"].values())
    assert stages == ["collect", "collect", "dpo", "dpo", "reward_model", "sft"]


def test_llama2_chat_reads_the_inputs_of_the_paper(typed: Typed) -> None:
    """Section 3.2: newest policy, all comparisons so far, the base anew, best samples of all rounds, PPO at the end."""
    words = ("pipeline=llama2_chat", "rounds=3")
    plan_of = plan(typed(*words), words)
    found = read_by(plan_of)
    assert found["collect_safety_1"] == {"policy": ["sft"]}
    assert found["reward_model_helpful_3"] == {
        "policy": ["rejection_sampling_2"],
        "comparisons": [f"collect_helpfulness_{index}" for index in (1, 2, 3)],
    }
    assert found["rejection_sampling_1"] == {
        "policy": ["sft"],
        "base": ["pretrain"],
        "reward_model": ["reward_model_helpful_1"],
        "safety_model": ["reward_model_safety_1"],
    }
    assert found["rejection_sampling_3"] == {
        "policy": ["rejection_sampling_2"],
        "base": ["pretrain"],
        "selected_responses": ["rejection_sampling_1", "rejection_sampling_2"],
        "reward_model": ["reward_model_helpful_3"],
        "safety_model": ["reward_model_safety_3"],
    }
    assert found["align"] == {
        "policy": ["rejection_sampling_3"],
        "reward_model": ["reward_model_helpful_3"],
        "safety_model": ["reward_model_safety_3"],
    }
    collect = plan_of.get("collect_safety_2")
    assert collect and collect.config["annotator"]["aspect"] == "gold_safety"


def test_llama2_chat_has_five_versions(typed: Typed) -> None:
    assert typed("pipeline=llama2_chat").rounds == 5


def test_the_last_algorithm_of_llama2_chat_is_swapped_by_one_override(typed: Typed) -> None:
    words = ("pipeline=llama2_chat", "rounds=1", "stage@align=dpo")
    step = plan(typed(*words), words).get("align")
    assert step and step.stage == "dpo"
