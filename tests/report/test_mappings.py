"""Sweeps over mappings or lists: runs are seeds of one setting only if their configs are equal up to the seed."""

import csv
import itertools

import pytest
from omegaconf import OmegaConf

pytest.importorskip("matplotlib")

from rlhf.cli.report import main  # noqa: E402
from rlhf.errors import UserError  # noqa: E402
from rlhf.report import figure  # noqa: E402
from rlhf.report.members import Member, flatten  # noqa: E402
from rlhf.report.sweep import Comparison  # noqa: E402
from rlhf.runs.run_directory import Run  # noqa: E402
from rlhf.stage import figures  # noqa: E402
from tests.report.fake_runs import write_run  # noqa: E402

_MODEL, _RULE = {"_target_": "x.ModelReward", "scale": 1.0}, {"_target_": "x.FunctionReward", "function": "m:f"}


def reports(tmp_path, group, hyperparameters, seeds=(0, 1)):
    """Compare runs, one per setting of a group and seed; the metric identifies the setting."""
    folders = [
        write_run(tmp_path, "ppo", f"{i}{seed}bbccddee",
                  {group: {"_target_": "x.Group"} | hyperparameter, "seed": seed},
                  {"val/accuracy": 0.5 + i / 10 + seed / 100})
        for i, hyperparameter in enumerate(hyperparameters) for seed in seeds
    ]  # fmt: skip
    return Comparison([Member(Run(folder)) for folder in folders], [])


CASES = {
    "a mapping or a word": (
        "objective.margin",
        [{"margin": {"significantly": 2.0}}, {"margin": "none"}],
        ["{significantly: 2}", "none"],
    ),
    "one grade or two": (
        "objective.margin",
        [{"margin": {"significantly": 2.0}}, {"margin": {"significantly": 2.0, "better": 1.0}}],
        ["{significantly: 2}", "{better: 1, significantly: 2}"],
    ),
    "one grade or another": (
        "objective.margin",
        [{"margin": {"significantly": 2.0}}, {"margin": {"better": 2.0}}],
        ["{significantly: 2}", "{better: 2}"],
    ),
    "text that looks like a list": (
        "model.chat_template",
        [{"chat_template": "[INST] {{ x }} [/INST]"}, {"chat_template": "chatml"}],
        ["[INST] {{ x }} [/INST]", "chatml"],
    ),
    "arguments or null": (
        "reward.arguments",
        [{"arguments": {"words": 12, "unit": "a b", "strict": True}}, {"arguments": None}],
        ['{strict: true, unit: "a b", words: 12}', None],
    ),
    "nothing in it, or null": ("reward.arguments", [{"arguments": {}}, {"arguments": None}], ["{}", None]),
    "a weight given or not": (
        "reward.weights",
        [{"weights": {"model": 1.0, "rule": 0.1}}, {"weights": {"model": 1.0}}],
        ["{model: 1, rule: 0.1}", "{model: 1}"],
    ),
    "a reward more": (
        "reward.rewards",
        [{"rewards": {"model": _MODEL}}, {"rewards": {"model": _MODEL, "rule": _RULE}}],
        ["{model: ModelReward}", "{model: ModelReward, rule: FunctionReward}"],
    ),
    "a mapping in a mapping": (
        "model.architecture",
        [{"architecture": {"rope": {"theta": 1.5}}}, {"architecture": {"rope": {"theta": 1.5, "kind": "linear"}}}],
        ["{rope: {theta: 1.5}}", "{rope: {kind: linear, theta: 1.5}}"],
    ),
    "the text of a number, not the number": (
        "reward.arguments",
        [{"arguments": {"a": "1"}}, {"arguments": {"a": 1, "b": 2}}],
        ['{a: "1"}', "{a: 1, b: 2}"],
    ),
    "lists": ("sampler.temperatures", [{"temperatures": [1]}, {"temperatures": [1.0, 1.2]}], ["[1]", "[1, 1.2]"]),
    "same keys": ("objective.margin.better", [{"margin": {"better": 2.0}}, {"margin": {"better": 3.0}}], [2.0, 3.0]),
    "a hyperparameter of some alone": ("objective.new", [{"beta": 1.0, "new": 5}, {"beta": 1.0}], [5, None]),
}


@pytest.mark.parametrize("case", CASES)
def test_settings_are_rows_and_seeds_are_grouped(tmp_path, case):
    key, hyperparameters, shown = CASES[case]
    comparison = reports(tmp_path, key.split(".")[0], hyperparameters)
    assert comparison.varying == [key] and comparison.seeds == 2
    # Each setting's mean is that of its own two values, by the metric that was written for it.
    means = {group.hyperparameters[key]: group.mean("val/accuracy") for group in comparison.groups}
    assert means == pytest.approx({value: 0.505 + i / 10 for i, value in enumerate(shown)})
    comparison.write_csv(tmp_path / "report.csv")
    with (tmp_path / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = sorted((row["val/accuracy"], row[key], row["seed"]) for row in rows)
    assert [row[1] for row in found[::2]] == ["" if value is None else str(value) for value in shown]
    assert [row[2] for row in found] == ["0", "1"] * 2


def test_equal_settings_written_differently_are_one_group(tmp_path):
    written = [
        {"margin": {"better": 1, "significantly": 2.0}, "grades": [1]},
        {"margin": {"significantly": 2, "better": 1.0}, "grades": [1.0]},
    ]
    folders = [
        write_run(
            tmp_path, "ppo", f"{i}abbccddee", {"objective": {"_target_": "x.Pairwise"} | hyperparameter, "seed": i}, {}
        )
        for i, hyperparameter in enumerate([*written, {"margin": "none", "grades": [1]}])
    ]
    comparison = Comparison([Member(Run(folder)) for folder in folders], [])
    assert comparison.varying == ["objective.margin"]
    assert [(group.label, len(group.members)) for group in comparison.groups] == [
        ("margin=none", 1),
        ("margin={better: 1, significantly: 2}", 2),
    ]


def test_mappings_that_name_runs_of_different_seeds_are_one_setting(tmp_path):
    folders = []
    for seed, more in itertools.product((0, 1), ({}, {"b": 1})):
        sft = tmp_path / "sft" / f"a{seed}bbccddee"
        if not sft.exists():
            write_run(tmp_path, "sft", sft.name, {"seed": seed}, {})
        reward = {"_target_": "x.Reward", "arguments": {"judge": f"{sft}/model", **more}}
        name = f"{seed}{len(more)}bbccddee"
        folders.append(write_run(tmp_path, "ppo", name, {"reward": reward, "seed": seed}, {}, [("judge", sft)]))
    comparison = Comparison([Member(Run(folder)) for folder in folders], [])
    assert {group.label: len(group.members) for group in comparison.groups} == {
        'arguments={b: 1, judge: "1 run of sft"}': 2,
        'arguments={judge: "1 run of sft"}': 2,
    }


def test_no_group_has_two_configs(tmp_path):
    """All combinations of hyperparameters of every kind: a group's configs without their seeds are equal."""
    margins = ("none", {"better": 1.0}, {"better": 1.0, "slightly": 0.5}, {})
    classes = ({"_target_": "x.Pairwise"}, {"_target_": "x.Other", "tau": 0.1}, {"_target_": "x.Other"})
    folders = []
    for i, (margin, chosen, seed) in enumerate(itertools.product(margins, classes, (0, 1))):
        config = {"objective": {**chosen, "margin": margin}, "data": {"_target_": "x.Data", "seed": seed}, "seed": seed}
        folders.append(write_run(tmp_path, "ppo", f"{i:02d}bbccddee", config, {}))
    comparison = Comparison([Member(Run(folder)) for folder in folders], [])
    assert len(comparison.groups) == 12 and {len(group.members) for group in comparison.groups} == {2}
    for group in comparison.groups:
        configs = [OmegaConf.to_container(OmegaConf.load(m.run.folder / "config.yaml")) for m in group.members]
        assert (
            {config.pop("seed") for config in configs} == {config["data"].pop("seed") for config in configs} == {0, 1}
        )
        assert configs[0] == configs[1]


def test_the_command_shows_the_mapping_in_table_page_csv_and_plot(tmp_path, capsys):
    reports(tmp_path, "objective", [{"margin": {"significantly": 2.0}}, {"margin": "none"}], seeds=(0,))
    words = [str(tmp_path / "ppo"), "--outputs", str(tmp_path), "--out", str(tmp_path), "--x", "margin"]
    assert main([*words, "--y", "val/accuracy", "--plot", str(tmp_path / "a.svg")]) == 0
    out = capsys.readouterr().out
    assert out.split()[:3] == ["run", "margin", "val/accuracy"] and "standard error" not in out
    page = (tmp_path / "report.html").read_text()
    assert "<th class=hyperparameter title='objective.margin'>margin</th>" in page
    assert "<td>{significantly: 2}</td>" in page and "<td>none</td>" in page and "settings, up to" not in page
    assert (tmp_path / "report.csv").read_text().startswith("run,status,objective.margin,")
    assert (tmp_path / "a.svg").stat().st_size > 2000


def test_the_x_axis_is_the_mapping_or_its_only_swept_number(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda made, path: drawn.append(made) or path)
    sweeps = {
        "words": [{"margin": {"better": 2.0}}, {"margin": "none"}],
        "numbers": [{"margin": {"better": 2.0, "slightly": 1}}, {"margin": {"better": 4.0, "slightly": 1}}],
        "both": [{"margin": {"better": 2.0, "slightly": 1}}, {"margin": {"better": 4.0, "slightly": 0}},
                 {"margin": {"better": 2.0, "slightly": 0}}],
    }  # fmt: skip
    found = {name: reports(tmp_path / name, "objective", hyperparameters) for name, hyperparameters in sweeps.items()}
    for name in ("words", "numbers"):
        figure.write_figure(found[name], tmp_path / "a.png", "margin", ["val/accuracy"])
    words, numbers = (made.axes[0] for made in drawn)
    assert [text.get_text() for text in words.get_xticklabels()] == ["none", "{better: 2}"]
    assert words.get_xlabel() == "margin" and numbers.get_xlabel() == "better"
    assert list(numbers.containers[0].lines[0].get_xdata()) == [2.0, 4.0]
    with pytest.raises(
        UserError,
        match="^--x margin: names more than one hyperparameter; "
        "type one of: objective.margin.better, objective.margin.slight",
    ):
        figure.write_figure(found["both"], tmp_path / "a.png", "margin", ["val/accuracy"])


def test_flatten_returns_a_mapping_and_its_keys():
    node = {"objective": {"_target_": "a.b.C", "margin": {"better": 1.5}}, "inputs": {"policy": None}}
    assert dict(flatten(node)) == {
        "objective": "C",
        "objective.margin": "{better: 1.5}",
        "objective.margin.better": 1.5,
        "inputs.policy": None,
    }
