"""Planned steps, their names and inputs, and what is refused before anything is trained."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from rlhf.errors import UserError
from rlhf.planning.plan import plan
from rlhf.planning.step import Plan

Typed = Callable[..., DictConfig]


def planned(typed: Typed, *overrides: str) -> Plan:
    return plan(typed(*overrides), overrides)


def names(found: Plan) -> list[str]:
    return [step.name for step in found.steps]


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["pipeline=instructgpt"], ["pretrain", "sft", "collect", "reward_model", "align"]),
        (["pipeline=instructgpt", "stage@align=dpo"], ["pretrain", "sft", "collect", "align"]),
        (["pipeline=instructgpt", "reward@align.reward=gold"], ["pretrain", "sft", "align"]),
        (["pipeline=instructgpt", "until=collect"], ["pretrain", "sft", "collect"]),
        (["pipeline=instructgpt", "model=hub"], ["sft", "collect", "reward_model", "align"]),
        (["pipeline=dpo"], ["pretrain", "sft", "collect", "align"]),
        (
            ["pipeline=llama2_chat", "rounds=2"],
            [
                "pretrain",
                "sft",
                *(
                    f"{name}_{index}"
                    for index in (1, 2)
                    for name in (
                        "collect_helpfulness",
                        "collect_safety",
                        "reward_model_helpful",
                        "reward_model_safety",
                        "rejection_sampling",
                    )
                ),
                "align",
            ],
        ),
        (["stage=sft"], ["sft"]),
    ],
)
def test_only_steps_whose_result_is_read_are_planned(typed: Typed, overrides: list[str], steps: list[str]) -> None:
    assert sorted(names(planned(typed, *overrides))) == sorted(steps)


@pytest.mark.parametrize("pipeline", ["instructgpt", "dpo", "llama2_chat"])
def test_a_step_is_planned_after_its_inputs(typed: Typed, pipeline: str) -> None:
    found = planned(typed, f"pipeline={pipeline}")
    seen: set[str] = set()
    for step in found.steps:
        assert set(step.parents) <= seen
        seen.add(step.fingerprint)


def test_skipped_steps_are_explained(typed: Typed) -> None:
    assert planned(typed, "pipeline=instructgpt", "stage@align=dpo").skipped == {
        "reward_model": "not needed, no step that runs reads it"
    }
    assert planned(typed, "pipeline=dpo", "model=hub", "until=sft").skipped == {
        "pretrain": "not needed, the model has weights",
        "collect": "after until=sft",
        "align": "after until=sft",
    }


def test_inputs_are_paths_of_runs_that_may_not_exist_yet(typed: Typed) -> None:
    found = planned(typed, "pipeline=instructgpt")
    sft, align, reward = found.get("sft"), found.get("align"), found.get("reward_model")
    assert sft and align and reward
    assert align.config["model"]["path"] == str(sft.folder / "model")
    assert align.config["reward"]["path"] == align.config["stage"]["value"] == str(reward.folder / "model")
    collect = found.get("collect")
    assert collect and reward.config["data"]["source"] == str(collect.folder)
    assert not Path("outputs").exists()
    assert align.inputs == {"policy": [sft.fingerprint], "reward_model": [reward.fingerprint]}


def test_weights_of_the_model_option_reach_the_first_step(typed: Typed) -> None:
    sft = planned(typed, "pipeline=instructgpt", "model=hub").get("sft")
    assert sft and sft.config["model"]["path"] == "org/name" and sft.inputs == {}


def test_run_directories_are_named_by_stage_and_fingerprint(typed: Typed) -> None:
    step = planned(typed, "pipeline=dpo").get("align")
    assert step and step.folder == Path("outputs/dpo") / step.fingerprint[:10]
    assert len(step.fingerprint) == 64


# Fingerprints


def fingerprints(typed: Typed, *overrides: str) -> dict[str, str]:
    return {step.name: step.fingerprint for step in planned(typed, *overrides).steps}


KNOWN: dict[tuple[str, ...], dict[str, str]] = {}


def changed(typed: Typed, *overrides: str, base: tuple[str, ...] = ("pipeline=instructgpt",)) -> set[str]:
    """Return the steps whose fingerprint an override changes."""
    before = KNOWN[base] = KNOWN.get(base) or fingerprints(typed, *base)
    after = fingerprints(typed, *base, *overrides)
    return {name for name in before if before[name] != after.get(name)}


ALL = {"pretrain", "sft", "collect", "reward_model", "align"}


@pytest.mark.parametrize(
    ("override", "steps"),
    [
        ("outputs=elsewhere", set()),
        ("+logger.csv={_target_:pytorch_lightning.loggers.CSVLogger,save_dir:x}", set()),
        ("+callbacks.every={_target_:pytorch_lightning.callbacks.Timer}", set()),
        ("compare.count=3", set()),
        ("align.objective.beta=0.5", {"align"}),
        ("align.objective.beta=0.10", set()),
        ("reward_model.stage.steps=9", {"reward_model", "align"}),
        ("adapter=lora", ALL - {"pretrain"}),
        ("sft.stage.steps=9", {"sft", "collect", "reward_model", "align"}),
        ("collect.sampler.temperature=1", set()),
        ("collect.sampler.temperature=2", {"collect", "reward_model", "align"}),
        ("seed=1", ALL),
        ("+align.seed=1", {"align"}),
        ("model.architecture.hidden_size=16", {"pretrain", "sft", "collect", "reward_model", "align"}),
    ],
)
def test_overrides_that_change_a_fingerprint(typed: Typed, override: str, steps: set[str]) -> None:
    assert changed(typed, override) == steps


def test_the_architecture_is_not_fingerprinted_where_a_path_is_given(typed: Typed) -> None:
    base = ("pipeline=instructgpt", "model=hub")
    assert changed(typed, "+model.architecture.hidden_size=3", base=base) == set()


def test_upstream_is_shared_by_ppo_and_dpo(typed: Typed) -> None:
    ppo, dpo = fingerprints(typed, "pipeline=instructgpt"), fingerprints(typed, "pipeline=dpo")
    assert {name for name in dpo if ppo[name] == dpo[name]} == {"pretrain", "sft", "collect"}


def test_a_single_run_has_the_fingerprint_of_the_step(typed: Typed) -> None:
    assert fingerprints(typed, "stage=pretrain")["pretrain"] == fingerprints(typed, "pipeline=dpo")["pretrain"]


def test_data_and_code_are_part_of_the_fingerprint(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    before = fingerprints(typed, "stage=sft")
    # As Hydra finds it: the plugin directory was added to the path for this test.
    parts = importlib.import_module("rlhf_fake.parts")
    monkeypatch.setattr(parts.Data, "digest", lambda self: "other content")
    with_data = fingerprints(typed, "stage=sft")
    monkeypatch.undo()
    assert before != with_data


# Refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "nothing to run; type stage=NAME or pipeline=NAME"),
        (["stage=sft", "pipeline=dpo"], "both a stage and a pipeline are given; type one of them"),
        (["stage=sft", "until=sft"], "until=sft: only a pipeline reads it; leave it out"),
        (["pipeline=dpo", "until=stf"], r"until=stf: no such step \(did you mean until=sft\?\)"),
        (["stage=ppo"], r"inputs.policy: has no value, and model.path reads it; type inputs.policy=RUN"),
        (["stage=ppo"], r"inputs.reward_model: has no value, and reward.path reads it"),
        (
            ["pipeline=dpo", "stage@align=ppo"],
            r"align.inputs.reward_model: has no value, and align.reward.path reads it",
        ),
        (["pipeline=instructgpt", "align.objective.beta=-1"], "align.objective.beta=-1"),
        (["pipeline=instructgpt", "+align.objective.betta=1"], "align.objective.betta: unknown option.*beta"),
        (["pipeline=dpo", "align.inputs.policy=${artifact:stf}"], r"reads the step stf, which does not exist.*sft"),
        (
            ["pipeline=dpo", "collect.inputs.policy=${artifact:align}"],
            "^the steps read each other in a circle, at align; change align.inputs",
        ),
        (["pipeline=instructgpt", "compare.after=algin"], r"compare.after=algin: no such step.*align"),
        (["pipeline=instructgpt", "compare.count=many"], "compare.count=many"),
        (
            ["pipeline=instructgpt", "steps=[sft,nothing]"],
            "steps: names nothing, which is not a step with a stage; add /stage@nothing: STAGE",
        ),
        (["stage=ppo", "inputs.policy=outputs/sft/123", "reward=gold"], "inputs.policy=outputs/sft/123"),
    ],
)
def test_invalid_plans_are_refused_before_anything_runs(
    typed: Typed, train, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        planned(typed, *overrides)
    assert train.calls == []


def test_findings_of_all_steps_are_reported_at_once(typed: Typed) -> None:
    with pytest.raises(UserError) as error:
        planned(typed, "pipeline=instructgpt", "sft.optimizer.lr=-1", "align.objective.beta=-1")
    assert [line.split("=")[0] for line in str(error.value).splitlines()] == [
        "sft.optimizer.lr",
        "align.objective.beta",
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["pipeline=instructgpt", "optimizer.lr=1"],
            "optimizer.lr=1: has no effect, because every step sets its own; type one of "
            "pretrain.optimizer.lr, sft.optimizer.lr, reward_model.optimizer.lr, align.optimizer.lr",
        ),
        (
            ["pipeline=instructgpt", "+collect.optimizer.lr=1"],
            "has no effect, because the stage of collect does not read optimizer; leave it out",
        ),
        (
            ["stage=collect", "inputs.policy=org/name", "optimizer.lr=1"],
            "has no effect, because no stage of this run reads optimizer; leave it out",
        ),
        (
            ["stage=sft", "inputs.reward_model=org/name"],
            "inputs.reward_model=org/name: has no effect, because stage=sft reads only inputs.policy; leave it out",
        ),
        (
            ["pipeline=instructgpt", "inputs.reward_model=org/name"],
            "because every step that reads it sets its own; type align.inputs.reward_model",
        ),
        (
            ["pipeline=dpo", "+align.inputs.value=org/name"],
            "stage=dpo reads only inputs.comparisons, inputs.policy; leave it out",
        ),
        (
            ["pipeline=dpo", "+align.nosuch.y=1"],
            "+align.nosuch.y=1: has no effect, because nothing reads align.nosuch; leave it out",
        ),
        (["pipeline=dpo", "+nosuch.y=1"], "+nosuch.y=1: has no effect, because nothing reads nosuch; leave it out"),
    ],
)
def test_an_override_that_nothing_reads_is_refused(typed: Typed, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        planned(typed, *overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["pipeline=instructgpt", "adapter=lora", "seed=3", "optimizer=adamw"],
        ["pipeline=instructgpt", "inputs.policy=org/name", "recipe=published"],
        ["pipeline=instructgpt", "align.inputs.reward_model=org/name"],
        ["stage=ppo", "inputs.policy=org/name", "inputs.reward_model=org/other", "optimizer.lr=1"],
    ],
)
def test_overrides_that_something_reads_are_accepted(typed: Typed, overrides: list[str]) -> None:
    assert planned(typed, *overrides).notes == []


def test_a_given_reward_model_replaces_its_step(typed: Typed) -> None:
    found = planned(typed, "pipeline=instructgpt", "align.inputs.reward_model=org/name")
    assert sorted(names(found)) == ["align", "pretrain", "sft"]
    align = found.get("align")
    assert align and align.inputs["reward_model"] == ["hub:org/name"]


def test_an_override_for_a_step_that_does_not_run_gets_a_note(typed: Typed) -> None:
    found = planned(typed, "pipeline=instructgpt", "stage@align=dpo", "reward_model.objective.beta=0.3")
    assert found.notes == ["reward_model.objective.beta=0.3: is not used, because the step reward_model does not run"]


def test_compare_needs_both_policies(typed: Typed) -> None:
    assert planned(typed, "pipeline=instructgpt").compare is not None
    assert planned(typed, "pipeline=instructgpt", "until=sft").compare is None


def test_the_config_of_a_step_has_no_interpolation(typed: Typed) -> None:
    for step in planned(typed, "pipeline=llama2_chat").steps:
        assert "${" not in json.dumps(step.config)


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", "a\nb", "$x"])
def test_a_name_that_leaves_its_directory_is_refused(typed: Typed, name: str) -> None:
    for words, key in ((["stage=pretrain"], "stage"), (["pipeline=dpo", "until=pretrain"], "pretrain.stage")):
        config = typed(*words)
        OmegaConf.update(config, f"{key}.name", name)
        with pytest.raises(UserError, match=rf"(?s)^{key}\.name={re.escape(name)}: must consist of letters, digits"):
            plan(config, words)
    config = typed("stage=pretrain", "stage.name=sweeps")  # where runs are not searched for
    with pytest.raises(UserError, match="stage.name=sweeps: is reserved, because outputs/sweeps holds no runs"):
        plan(config, [])
    config = typed("pipeline=dpo")
    config.steps = [name]
    with pytest.raises(UserError, match=rf"(?s)^steps={re.escape(name)}: must consist of letters, digits"):
        plan(config, [])
