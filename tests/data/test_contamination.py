"""Contamination check: one file has one held-out part; where it has two, stages measuring on trained prompts warn."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rlhf.data import Data, contamination
from rlhf.runs.run_directory import Run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "given.jsonl"
    rows = [{"prompt": f"question {i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(1000)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(record, source, validation):
    return Data(record, str(source), None, validation, 128).load()


def prompts_of(records):
    return {(r.messages if hasattr(r, "messages") else r.prompt)[0].content for r in records}


def run(folder, data, ancestors=()):
    """Return a run as the pipeline starts it."""
    config = {"data": {"validation": data.data.validation}}
    known = {one.fingerprint: {"folder": str(one.folder)} for one in ancestors}
    made = Run(folder)
    made.begin(config, {"fingerprint": folder.name, "ancestors": known}, "rlhf")
    contamination.save_prompt_hashes(folder, data)
    return made


def test_by_default_a_file_has_one_held_out_part_for_all_stages(file):
    defaults = {name: OmegaConf.load(ROOT / f"conf/data/{name}.yaml").validation for name in ("prompts", "comparisons")}
    defaults["demonstrations"] = OmegaConf.load(ROOT / "conf/data/demonstrations.yaml").validation
    splits = {name: load(name[:-1], file, share) for name, share in defaults.items()}
    held = [prompts_of(split.validation) for split in splits.values()]
    assert held[0] == held[1] == held[2] and len(held[0]) == 100
    assert not held[0] & prompts_of(splits["demonstrations"].train)
    assert len(load("prompt", "testbed", None).validation) == 400


def test_a_stage_warns_of_held_out_prompts_its_policy_was_trained_on(file, tmp_path):
    """With 0.1 and 400 of 1000 prompts in the same order, 300 of the 400 lie beyond the first 100."""
    sft = run(tmp_path / "sft" / "one", load("demonstration", file, 0.1))
    wide = load("prompt", file, 400)
    ppo = run(tmp_path / "ppo" / "two", wide, [sft])
    (line,) = contamination.check_stage(ppo.folder, wide)
    assert "300 of 400 held-out prompts were trained on by sft" in line and str(sft.folder) in line
    assert "data.validation=0.1 here, or data.validation=400 there" in line
    assert contamination.check_stage(ppo.folder, load("prompt", file, None)) == []  # what the line says to type
    other = Data("prompt", str(file), None, 0.1, 128, seed=1).load()
    assert "one data.seed" in contamination.check_stage(ppo.folder, other)[0]


def test_models_and_their_ancestors_are_checked_for_contamination(file, tmp_path):
    sft = run(tmp_path / "sft" / "one", load("demonstration", file, 0.1))
    ppo = run(tmp_path / "ppo" / "two", load("prompt", file, 400), [sft])
    asked = load("prompt", file, 400).validation
    lines = contamination.check_models(asked, [sft.folder / "model", ppo.folder / "model", None, "some/hub-id"])
    assert len(lines) == 1 and "300 of 400" in lines[0]  # PPO held all of them out
    assert contamination.check_models(load("prompt", file, 0.1).validation, [ppo.folder / "model"]) == []


def test_testbed_and_run_outputs_are_not_checked_for_contamination(file, tmp_path):
    testbed = load("prompt", "testbed", None)
    sft = run(tmp_path / "sft" / "one", load("demonstration", "testbed", 0.1))
    assert not (sft.folder / contamination.FILE).exists()
    assert contamination.check_stage(run(tmp_path / "ppo" / "two", testbed, [sft]).folder, testbed) == []
    # A run's comparisons ask the prompts it sampled from: training prompts by design.
    learnt = run(tmp_path / "sft" / "three", load("demonstration", file, 0.1))
    collect = run(tmp_path / "collect" / "four", load("prompt", file, 0.1), [learnt])
    (collect.folder / "comparisons.jsonl").write_text("".join(file.read_text().splitlines(keepends=True)[:50]))
    made = load("comparison", collect.folder, 0.1)
    assert (
        contamination.check_stage(run(tmp_path / "reward_model" / "five", made, [learnt, collect]).folder, made) == []
    )
