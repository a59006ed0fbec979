"""Rounds on the command line: one override for their number, one for all rounds of a step, one for a single round."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rlhf.cli import main
from rlhf.planning import rounds
from rlhf.planning.plan import plan


@pytest.fixture(autouse=True)
def isolated_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("collect_safety_9.sampler.samples=3", "collect_safety_9: no such round, rounds=5; type collect_safety_5 or"),
        ("collect_safety_2.sampler.sampels=3", "unknown option (did you mean collect_safety_2.sampler.samples?)"),
        ("collect_safty_2.sampler.samples=3", "collect_safty_2: unknown option (did you mean collect_safety?)"),
        ("rounds=0", "rounds=0: must be a whole number from 1 to 100; type rounds=3"),
        ("annotator@collect_safety_2.annotator=rewrd", "no such option (did you mean reward?)"),
        ("collect_safety_2.sampler.samples=1", "collect_safety_2.sampler.samples=1: should be greater than or eq"),
        (
            "rejection_sampling_1.sampler.temperatures=[1,2,3] rejection_sampling.sampler.samples=2",
            "rejection_sampling_1.sampler.temperatures=[1, 2, 3]: has 3 temperatures for 2 samples, so that some "
            "have no response; type rejection_sampling_1.sampler.samples=3 or more",
        ),
    ],
)
def test_a_mistake_is_reported_in_one_line(capsys: pytest.CaptureFixture[str], line: str, said: str) -> None:
    assert main.run(["pipeline=llama2_chat", *line.split()]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and len(captured.err.strip().splitlines()) == 1
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "stage=sft collect_safety_2.sampler.samples=4",
            "collect_safety_2: is a round of a step, and this config repeats no step",
        ),
        ("stage=collect inputs.policy=x/y sampler.samples=1", "sampler.samples=1: should be greater than or"),
        ("stage=reward_model objective.margin={superb:1}", "should be 'negligible', 'slightly', 'better' or 'signif"),
        ("stage=reward_model stage.safety_coefficient=-1", "stage.safety_coefficient=-1: should be greater than or eq"),
        ("stage=reward_model stage.normalize=demos", "stage.normalize=demos: should be 'none', 'mean', 'standard' or"),
        ("stage=rejection_sampling inputs.policy=x/y reward=gold stage.select=best", "should be 'best_per_prompt'"),
        (
            "stage=rejection_sampling inputs.policy=x/y reward=gold inputs.selected_responses=here/none",
            "inputs.selected_responses=here/none",
        ),
    ],
)
def test_mistakes_of_single_stages_are_reported_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    assert main.run(line.split()) == 2
    captured = capsys.readouterr()
    assert said in captured.err and len(captured.err.strip().splitlines()) == 1


def test_llama2_chat_plans_the_gated_reward_and_two_collect_steps(composed, tmp_path: Path) -> None:
    words = ["pipeline=llama2_chat", *rounds.mark_round_overrides(["rounds=2", "collect_safety_2.sampler.samples=6"])]
    found = plan(composed(*words), words)
    steps = {step.name: step.config for step in found.steps}
    assert len(steps) == 2 + 2 * 5 + 1
    assert steps["collect_helpfulness_1"]["annotator"]["aspect"] == "helpfulness"
    assert [steps[f"collect_safety_{i}"]["sampler"]["samples"] for i in (1, 2)] == [4, 6]
    for name, model in (("align", "rejection_sampling_2"), ("rejection_sampling_2", "pretrain")):
        reward = steps[name]["reward"]
        assert reward["_target_"] == "rlhf.reward.combined.GatedReward"
        folders = {step.name: str(step.folder) for step in found.steps}
        assert reward["helpfulness"]["path"].startswith(folders["reward_model_helpful_2"])
        assert reward["safety"]["path"].startswith(folders["reward_model_safety_2"])
        assert steps[name]["model"]["path"].startswith(folders[model])
    assert steps["align"]["stage"]["normalize_scores"] == "batch"
    assert "${" not in json.dumps(steps)


def test_each_reward_model_can_read_the_comparisons_of_the_other(composed) -> None:
    """Mixtures of 90/10 and 50/50, as in Llama 2; without the override neither is part of the run."""
    words = ["pipeline=llama2_chat", "rounds=2", "until=rejection_sampling"]
    mixed = [
        "data@reward_model_safety.data=safety_mixture",
        "data@reward_model_helpful.data=helpfulness_mixture",
    ]
    plain, found = plan(composed(*words), words), plan(composed(*words, *mixed), [*words, *mixed])
    folders = {step.name: str(step.folder) for step in found.steps}
    for kind, other, share in (("safety", "helpfulness", 0.1), ("helpful", "safety", 0.5)):
        step, before = found.get(f"reward_model_{kind}_2"), plain.get(f"reward_model_{kind}_2")
        assert step and before and set(before.inputs) == {"policy", "comparisons"}
        data = step.config["data"]
        assert data["weights"]["other"] / sum(data["weights"].values()) == pytest.approx(share)
        own = "safety" if kind == "safety" else "helpfulness"
        assert data["parts"]["own"]["source"] == [folders[f"collect_{own}_{i}"] for i in (1, 2)]
        assert data["parts"]["other"]["source"] == [folders[f"collect_{other}_{i}"] for i in (1, 2)]
        assert {folders[f"collect_{other}_{i}"] for i in (1, 2)} <= {str(folder) for folder in step.parents.values()}


def test_every_pipeline_with_repeated_steps_sets_rounds() -> None:
    for path in sorted((Path(rounds.__file__).parents[1] / "conf" / "pipeline").glob("*.yaml")):
        node = OmegaConf.load(path)
        assert ("repeat" in node) == ("rounds" in node), path
