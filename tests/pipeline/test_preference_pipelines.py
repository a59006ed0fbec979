"""Plans of iterative DPO and RLAIF, from the real config: the inputs of each step, and which steps run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.planning.plan import plan
from rlhf.planning.step import Plan
from rlhf.runs import fingerprint
from rlhf.testing import compose_config


@pytest.fixture(autouse=True)
def isolated_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


def planned(*overrides: str) -> Plan:
    return plan(compose_config(*overrides), overrides)


def names(found: Plan) -> list[str]:
    return [step.name for step in found.steps]


def test_iterative_dpo_continues_from_the_newest_policy() -> None:
    found = planned("pipeline=iterative_dpo")
    assert names(found) == ["pretrain", "sft", "collect_1", "align_1", "collect_2", "align_2"]
    sft, first, second = found.get("sft"), found.get("align_1"), found.get("align_2")
    collect_1, collect_2 = found.get("collect_1"), found.get("collect_2")
    assert sft and first and second and collect_1 and collect_2
    assert first.inputs == {"policy": [sft.fingerprint], "comparisons": [collect_1.fingerprint]}
    assert second.inputs == {"policy": [first.fingerprint], "comparisons": [collect_2.fingerprint]}
    assert collect_2.inputs == {"policy": [first.fingerprint]}
    assert second.config["stage"]["reference"] is None  # the policy at the start of the round


def test_iterative_dpo_with_a_reward_annotator_trains_a_reward_model() -> None:
    found = planned(
        "pipeline=iterative_dpo", "annotator@collect_1.annotator=reward", "annotator@collect_2.annotator=reward"
    )
    assert names(found)[2:4] == ["collect", "reward_model"]
    reward, collect = found.get("reward_model"), found.get("collect_2")
    assert reward and collect and collect.inputs["reward_model"] == [reward.fingerprint]


@pytest.mark.parametrize("objective", ["kto", "relative", "reward_aware", "simpo"])
def test_the_loss_is_swapped_by_one_override(objective: str) -> None:
    found = planned("pipeline=dpo", f"objective@align.objective={objective}")
    assert names(found) == ["pretrain", "sft", "collect", "align"]


def test_kto_takes_the_run_of_a_collect_step_as_labels() -> None:
    found = planned("pipeline=dpo", "stage@align=kto")
    align, collect = found.get("align"), found.get("collect")
    assert align and collect and align.stage == "kto"
    assert align.config["data"]["record"] == "label" and align.config["data"]["source"] == str(collect.folder)


def test_a_role_that_is_wrong_for_a_step_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="inputs.reward_model.*: has no effect"):
        planned("stage=dpo", "inputs.policy=model", "inputs.reward_model=model")
    single = planned("stage=dpo", "inputs.policy=model", "inputs.reference=model").steps[0]
    assert single.config["stage"]["reference"] == "model"


def test_rlaif_replaces_the_labeller_by_a_judge() -> None:
    found = planned("pipeline=rlaif")
    assert names(found) == ["pretrain", "sft", "judge", "collect", "align"]
    pretrain, judge, collect = found.get("pretrain"), found.get("judge"), found.get("collect")
    assert pretrain and judge and collect
    assert judge.inputs == {"policy": [pretrain.fingerprint]}
    assert collect.config["annotator"]["path"] == str(judge.folder / "model")
    assert collect.config["annotator"]["template"] == judge.config["data"]["template"] == "short"
    assert collect.inputs["judge"] == [judge.fingerprint]


def test_rlaif_with_a_given_judge_trains_none(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    found = planned("pipeline=rlaif", "collect.inputs.judge=model", "collect.annotator.template=instruction")
    assert names(found) == ["pretrain", "sft", "collect", "align"]


def test_rlaif_with_ppo_trains_a_reward_model_on_the_verdicts() -> None:
    assert names(planned("pipeline=rlaif", "stage@align=ppo"))[-3:] == ["collect", "reward_model", "align"]


def test_nested_data_may_come_from_a_run_that_does_not_exist_yet() -> None:
    """The data is identified by that run, and not read."""
    inner = {"_target_": "rlhf.data.Data", "record": "comparison", "source": "outputs/collect/abc"}
    config = {"data": {"_target_": "rlhf.annotator.judgements.Judgements", "comparisons": inner, "template": "short"}}
    keys = fingerprint.keys_with_digest(config)
    assert keys == ("data", "data.comparisons")
    assert fingerprint.data_digests(config, {"outputs/collect/abc": "fingerprint"}, keys) == {}
