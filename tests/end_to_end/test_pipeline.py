"""Pipelines through the command line: what they write, what they reuse, what one override swaps."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.end_to_end.commands import PATIENCE, Command, Done, digests, interpreter, only, runs, stages, status
from tests.end_to_end.conftest import COMPARE, DPO, MODEL, POLICIES, PPO, REWARD

INSTRUCTGPT = ["pipeline=instructgpt", *MODEL, *POLICIES, *REWARD, *COMPARE]
STEPS = {"pretrain": "pretrain", "sft": "sft", "collect": "collect", "reward_model": "reward_model", "align": "ppo"}

Rlhf = Callable[..., Done]


@pytest.mark.parametrize("step", STEPS)
def test_a_step_writes_plain_files(pipeline: Done, workdir: Path, step: str):
    folder = only(workdir / "outputs", STEPS[step])
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["stage"]["name"] == STEPS[step] and config["seed"] == 0
    assert "${" not in (folder / "config.yaml").read_text()
    assert status(folder)["status"] == "finished"
    assert json.loads((folder / "lineage.json").read_text())["fingerprint"].startswith(folder.name)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["headline"] in summary["metrics"]
    assert {"wall_s", "peak_memory_bytes", "versions", "hardware", "command", "seed"} <= summary.keys()
    assert (folder / "samples.jsonl").exists() == (step in ("sft", "align"))
    if step == "collect":
        lines = (folder / "comparisons.jsonl").read_text().splitlines()
        assert lines and all("prompt" in json.loads(line) for line in lines)
        return
    assert {"tokens_per_s", "samples_per_s", "median_step_s"} <= summary.keys()
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert rows and all(row["loss"] for row in rows) and any(row[summary["headline"]] for row in rows)
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in (folder / "model").iterdir()
    }


def test_lineage_names_every_ancestor(pipeline: Done, workdir: Path):
    lineage = json.loads((only(workdir / "outputs", "ppo") / "lineage.json").read_text())
    assert sorted(x["stage"] for x in lineage["ancestors"].values()) == ["collect", "pretrain", "reward_model", "sft"]
    assert {role: len(names) for role, names in lineage["inputs"].items()} == {"policy": 1, "reward_model": 1}


def test_the_output_reports_the_results_and_the_next_commands(pipeline: Done):
    assert pipeline.plan == "plan: pretrain -> sft -> collect -> reward_model -> align"
    for text in ("[5/5] align", "finished in", "align against sft, 8 held-out prompts", "gold reward", "KL(after"):
        assert text in pipeline.out
    assert re.search(r"Next:\n +rlhf ", pipeline.out)
    assert "Traceback" not in pipeline.err and "Warning" not in pipeline.err, pipeline.err


def test_the_same_command_reuses_everything(pipeline: Done, workdir: Path, rlhf: Rlhf):
    before = digests(runs(workdir / "outputs"))
    again = rlhf(workdir, *INSTRUCTGPT, *PPO)
    assert again.status == 0, again.err
    assert again.out.count("  reused") >= 5 and "starts" not in again.out and "resumes" not in again.out
    assert digests(runs(workdir / "outputs")) == before
    table = pipeline.out[pipeline.out.index("align against sft") :]
    assert again.out.endswith(table)  # of the comparison, which was read from its file


def test_a_finished_pipeline_typed_again_imports_no_torch(pipeline: Done, workdir: Path):
    code = (
        "import sys; from rlhf.cli.main import run; status = run(sys.argv[1:]); "
        "heavy = {'torch', 'pytorch_lightning', 'transformers', 'peft'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(status)"
    )
    again = interpreter(workdir, "-c", code, *INSTRUCTGPT, *PPO)
    assert again.status == 0 and again.out.count("  reused") >= 5, again.err


def test_options_that_cannot_change_the_result_reuse_runs(pipeline: Done, workdir: Path, rlhf: Rlhf):
    before = digests(runs(workdir / "outputs"))
    again = rlhf(workdir, *INSTRUCTGPT, *PPO, "callbacks=quiet", "callbacks.checkpoints.every_n_batches=1", "until=sft")
    assert again.status == 0, again.err
    assert again.plan.startswith("plan: pretrain -> sft") and "starts" not in again.out
    assert digests(runs(workdir / "outputs")) == before


@pytest.mark.parametrize(
    ("words", "plan", "trained"),
    [
        (["stage@align=dpo", *DPO], "pretrain -> sft -> collect -> align", ["dpo"]),
        (
            ["stage@align=dpo", "objective@align.objective=ipo", *DPO],
            "pretrain -> sft -> collect -> align",
            ["dpo"],
        ),
        (["reward@align.reward=gold", *PPO], "pretrain -> sft -> align", ["ppo"]),
    ],
    ids=["dpo", "ipo", "gold"],
)
def test_one_override_swaps_the_algorithm(
    pipeline: Done, workdir: Path, rlhf: Rlhf, words: list[str], plan: str, trained: list[str]
):
    outputs = workdir / "outputs"
    before, untouched = runs(outputs), digests(runs(outputs))
    done = rlhf(workdir, *INSTRUCTGPT, *words)
    assert done.status == 0, done.err
    assert done.plan.partition(";")[0] == f"plan: {plan}"
    assert stages(runs(outputs) - before) == trained
    assert done.out.count(" starts") == 1 and "reward_model  outputs" not in done.out
    assert digests(before) == untouched
    assert all(status(folder)["status"] == "finished" for folder in runs(outputs))


@pytest.mark.slow
def test_a_sweep_trains_only_what_differs(pipeline: Done, workdir: Path, start: Callable[..., Command]):
    outputs = workdir / "outputs"
    before, untouched = runs(outputs), digests(runs(outputs))
    done = start(workdir, *INSTRUCTGPT, *PPO, "~compare", "align.objective.beta=0.01,0.1", "-m").wait(2 * PATIENCE)
    assert done.status == 0, done.out + done.err
    new = runs(outputs) - before
    assert stages(new) == ["ppo", "ppo"]
    betas = {yaml.safe_load((folder / "config.yaml").read_text())["objective"]["beta"] for folder in new}
    assert betas == {0.01, 0.1}
    assert digests(before) == untouched
    (sweep,) = (outputs / "sweeps").iterdir()
    rows = list(csv.DictReader((sweep / "results.csv").open()))
    assert [(row["align.objective.beta"], row["status"]) for row in rows] == [("0.01", "finished"), ("0.1", "finished")]
    assert {(workdir / row["run"]).resolve() for row in rows} == {folder.resolve() for folder in new}
    assert "2 of 2 jobs finished" in done.out


def test_the_dpo_pipeline_reuses_the_steps_of_instructgpt(pipeline: Done, workdir: Path, rlhf: Rlhf):
    before = runs(workdir / "outputs")
    done = rlhf(workdir, "pipeline=dpo", *MODEL, *POLICIES, *DPO, *COMPARE, "align.stage.epochs=2")
    assert done.status == 0, done.err
    assert done.plan == "plan: pretrain -> sft -> collect -> align"
    assert stages(runs(workdir / "outputs") - before) == ["dpo"]


LLAMA2 = [
    *(
        f"collect_{aspect}.{word}"
        for aspect in ("helpfulness", "safety")
        for word in ("data.size=48", "sampler.samples=4", "sampler.max_new_tokens=8")
    ),
    *(f"reward_model_{aspect}.stage.batch_size=4" for aspect in ("helpful", "safety")),
    *(
        f"rejection_sampling.{word}"
        for word in (
            "data.size=32",
            "data.validation=8",
            "sampler.max_new_tokens=8",
            "sampler.samples=2",
            "stage.batch_size=16",
        )
    ),
]
ROUND = ["collect", "collect", "rejection_sampling", "reward_model", "reward_model"]


def test_the_rounds_of_llama2_chat(pipeline: Done, workdir: Path, rlhf: Rlhf):
    """Two rounds, one with an override for a single round; then a third, which reuses the two."""
    words = ["pipeline=llama2_chat", *MODEL, *(w for w in POLICIES if "collect" not in w), *PPO, *COMPARE, *LLAMA2]
    before = runs(workdir / "outputs")
    # Responses of an untrained model are seldom safe or helpful: the annotator's noise creates the preferences.
    noise = ["collect_helpfulness.annotator.noise=1", "collect_safety.annotator.noise=1"]
    done = rlhf(workdir, *words, *noise, "rounds=2", "rejection_sampling_2.sampler.samples=4")
    assert done.status == 0, done.out + done.err
    new = runs(workdir / "outputs") - before
    assert stages(new) == sorted([*ROUND, *ROUND, "ppo"])
    picked = [folder for folder in new if folder.parent.name == "rejection_sampling"]
    summaries = [json.loads((folder / "summary.json").read_text())["metrics"] for folder in picked]
    assert sorted(summary["samples"] for summary in summaries) == [2, 4]
    assert all((folder / "best_of_k.png").is_file() for folder in picked)
    (ppo,) = (folder for folder in new if folder.parent.name == "ppo")
    ancestors = json.loads((ppo / "lineage.json").read_text())["ancestors"].values()
    assert sorted(x["stage"] for x in ancestors) == sorted([*ROUND, *ROUND, "pretrain", "sft"])
    assert "made from" in done.out and re.search(r"rejection_sampling_2 .*rejection_sampling_1", done.out, re.S)

    third = rlhf(
        workdir, *words, *noise, "rounds=3", "rejection_sampling_2.sampler.samples=4", "until=collect_safety_3"
    )
    assert third.status == 0, third.out + third.err
    assert stages(runs(workdir / "outputs") - before - new) == ["collect"]
