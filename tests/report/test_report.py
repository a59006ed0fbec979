"""Report that compares runs: selection, differences, tables, plots, family tree, one HTML page."""

import csv
import io
import json
import math
import re

import pytest

pytest.importorskip("matplotlib")

from rlhf.cli.report import main  # noqa: E402
from rlhf.errors import UserError  # noqa: E402
from rlhf.report import plots  # noqa: E402
from rlhf.report.members import Member, find_runs, flatten, newest_sweep  # noqa: E402
from rlhf.report.sweep import Comparison, compare_runs, short_names, show, with_error  # noqa: E402
from rlhf.report.tree import family_tree  # noqa: E402
from rlhf.running import curves  # noqa: E402
from rlhf.runs import run_directory, run_files
from rlhf.runs.run_directory import Run  # noqa: E402
from rlhf.stage import figures  # noqa: E402
from rlhf.storage import yaml_files  # noqa: E402
from tests.report.fake_runs import ppo_sweep, write_run  # noqa: E402


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("report") / "outputs"
    return outputs, ppo_sweep(outputs, betas=(0.01, 0.1, 1.0), seeds=(0, 1), steps=40)


def compared(*folders):
    return Comparison([Member(Run(folder)) for folder in folders], [])


def test_references_are_sweeps_runs_folders_and_fingerprints(world):
    outputs, sweep = world
    assert len(find_runs(sweep, outputs)) == 6
    assert [run.stage for run in find_runs(outputs / "sft" / "aa11aa11aa", outputs)] == ["sft"]
    assert [run.stage for run in find_runs("bb22", outputs)] == ["reward_model"]
    assert len(find_runs(outputs / "ppo" / "0", outputs)) == 6
    assert newest_sweep(outputs) == sweep
    with pytest.raises(UserError, match="no such run or directory"):
        find_runs(sweep.parent / "*-nothing-*", outputs)  # a glob without matches, as a shell passes it on
    with pytest.raises(UserError, match="no such run or directory"):
        find_runs("ffff", outputs)
    (outputs / "empty").mkdir(exist_ok=True)
    with pytest.raises(UserError, match="no runs in this directory"):
        find_runs(outputs / "empty", outputs)


def test_a_directory_selects_its_last_runs_without_their_ancestors(world):
    outputs, _ = world
    assert {run.stage for run in find_runs(outputs, outputs)} == {"ppo"}


def test_a_job_of_a_sweep_is_shown_even_as_ancestor_of_another(tmp_path):
    first = write_run(tmp_path, "dpo", "aa11aa11aa", {"seed": 0}, {"val/accuracy": 0.6})
    second = write_run(tmp_path, "dpo", "bb22bb22bb", {"seed": 0}, {"val/accuracy": 0.7}, [("policy", first)])
    sweep = tmp_path / "sweeps" / "2026-01-01-iterative_dpo"
    for index, folder in enumerate((first, second)):
        (sweep / f"{index:03d}").mkdir(parents=True)
        (sweep / f"{index:03d}" / "run").symlink_to(folder)
    assert [run.folder.name for run in find_runs(sweep, tmp_path)] == ["bb22bb22bb"]  # a directory like any other
    (sweep / "multirun.yaml").touch()
    assert [run.folder.name for run in find_runs(sweep, tmp_path)] == ["aa11aa11aa", "bb22bb22bb"]


def test_the_swept_hyperparameter_is_detected_and_seeds_are_grouped(world):
    outputs, sweep = world
    comparison = compare_runs([sweep], outputs)
    assert comparison.varying == ["objective.beta"]
    assert [group.label for group in comparison.groups] == ["beta=0.01", "beta=0.1", "beta=1"]
    assert comparison.seeds == 2
    group = comparison.groups[1]
    values = [member.metrics["val/gold"] for member in group.members]
    assert group.mean("val/gold") == pytest.approx(sum(values) / 2)
    assert group.error("val/gold") == pytest.approx(abs(values[0] - values[1]) / 2)  # sd / sqrt(2) of two values
    assert math.isnan(group.mean("absent"))
    assert comparison.best("val/gold") is max(comparison.groups, key=lambda g: g.mean("val/gold"))
    assert comparison.best("loss") is None  # PPO's training loss does not measure quality


def test_a_hyperparameter_that_differs_only_upstream_is_named_with_its_stage(tmp_path):
    config = {"objective": {"_target_": "x.Pairwise", "margin": "none"}}
    runs = []
    for i, margin in enumerate(("none", "large")):
        config["objective"]["margin"] = margin
        reward = write_run(tmp_path, "reward_model", f"a{i}bbccddee", config, {"val/accuracy": 0.7 + i / 10})
        runs.append(
            write_run(tmp_path, "ppo", f"c{i}bbccddee", {"reward": {"path": f"{reward}/model"}, "seed": 0},
                      {"score": 1.0 + i}, [("reward_model", reward)])
        )  # fmt: skip
    comparison = compared(*runs)
    assert comparison.varying == ["reward_model: objective.margin"]
    assert [group.label for group in comparison.groups] == ["reward_model margin=large", "reward_model margin=none"]


def test_a_hyperparameter_common_to_all_steps_is_one_column(tmp_path):
    runs = []
    for rank in (4, 8):
        sft = write_run(tmp_path, "sft", f"a{rank}bbccddee", {"adapter": {"_target_": "x.LoRA", "rank": rank}}, {})
        own = {"adapter": {"_target_": "x.LoRA", "rank": rank}}
        runs.append(write_run(tmp_path, "dpo", f"c{rank}bbccddee", own, {"val/loss": 0.6}, [("policy", sft)]))
    assert compared(*runs).varying == ["adapter.rank"]


def test_hyperparameters_that_vary_together_are_one_column_and_all_in_the_csv(tmp_path):
    tiny = {
        "model": {"architecture": {"hidden_size": 128, "layers": 4}},
        "objective": {"_target_": "x.DPO", "beta": 0.1},
    }
    big = {"model": {"architecture": {"hidden_size": 288, "layers": 6}}, "objective": {"_target_": "x.IPO", "tau": 0.1}}
    comparison = compared(
        write_run(tmp_path, "dpo", "a1bbccddee", tiny, {"val/loss": 0.6}),
        write_run(tmp_path, "dpo", "a2bbccddee", big, {"val/loss": 0.5}),
    )
    assert comparison.varying == ["model.architecture.hidden_size", "objective"]
    assert comparison.together == {"model.architecture.hidden_size": ["model.architecture.layers"]}
    assert [group.label for group in comparison.groups] == ["hidden_size=128, DPO", "hidden_size=288, IPO"]
    comparison.write_csv(tmp_path / "report.csv")
    with (tmp_path / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["model.architecture.layers"] for row in rows] == ["4", "6"]
    assert [row["objective"] for row in rows] == ["DPO", "IPO"]


def test_unfinished_runs_show_their_newest_values(tmp_path):
    from rlhf.storage.metrics_file import MetricsFile

    folder = write_run(tmp_path, "sft", "a1bbccddee", {}, {}, status="failed")
    file = MetricsFile(folder / "metrics.csv")
    file.write(0, {"loss": 3.0})
    file.write(1, {"loss": 2.0})
    assert Member(Run(folder)).metrics["loss"] == 2.0


def test_an_evaluation_in_the_run_directory_is_part_of_its_metrics(tmp_path):
    folder = write_run(tmp_path, "ppo", "a1bbccddee", {}, {"kl": 3.0})
    estimate = {"mean": 0.75, "se": 0.01, "count": 400}
    (folder / "evaluation-0123456789.json").write_text(
        json.dumps(
            {
                "before": {"gold": {"mean": 0.5}},
                "after": {"gold": estimate},
                "differences": {"gold": {"mean": 0.25}},
                "kl": {"mean": 2.5},
            }
        )
    )
    metrics = Member(Run(folder)).metrics
    assert {name: metrics[name] for name in ("before_gold", "after_gold", "gold_difference", "after_kl", "kl")} == {
        "before_gold": 0.5,
        "after_gold": 0.75,
        "gold_difference": 0.25,
        "after_kl": 2.5,
        "kl": 3.0,
    }


def test_main_metrics_put_held_out_ones_first(world):
    outputs, sweep = world
    telling = compare_runs([sweep], outputs).main_metrics(6)
    assert telling[:2] == ["val/gold", "gold"] and "epoch" not in telling
    assert compare_runs([sweep], outputs, ["entropy"]).main_metrics(6) == ["entropy"]
    with pytest.raises(UserError, match="--metric entropi: no run has it; type one of: .*entropy"):
        compare_runs([sweep], outputs, ["entropi"])


def test_the_command_prints_a_table_and_writes_page_and_csv(world, capsys, monkeypatch):
    outputs, sweep = world
    monkeypatch.chdir(outputs.parent)
    assert main([]) == 0  # the newest sweep
    out = capsys.readouterr().out
    head, *rows = out.splitlines()
    assert head.split()[:3] == ["run", "beta", "val/gold"]
    assert [row.split()[4] for row in rows[:3]] == ["0.01", "0.1", "1"]
    assert "mean ± standard error over seeds" in out
    assert "not finished: 012_abcdef objective.beta=9.0 (failed) the loss became nan at batch 3" in out
    with (sweep / "report.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 6 and {row["objective.beta"] for row in table} == {"0.01", "0.1", "1.0"}
    page = (sweep / "report.html").read_text()
    assert not re.search(r"(src|href)=['\"](?!data:)", page)  # nothing external is loaded
    assert page.count("data:image/svg+xml;base64,") == 3
    for heading in (
        "Results",
        "What the swept hyperparameters do",
        "Reward against KL",
        "Training",
        "Family tree",
        "Responses",
    ):
        assert f"<h2>{heading}</h2>" in page
    assert (sweep / "results.csv").read_text().startswith("job,")  # the launcher's own table is unchanged


def test_single_runs_are_reported_in_their_own_directory(world, capsys):
    outputs, _ = world
    assert main([str(outputs / "sft" / "aa11aa11aa"), "--outputs", str(outputs)]) == 0
    pages = list((outputs / "reports").glob("*/report.html"))
    assert len(pages) == 1 and "What the swept hyperparameters do" not in pages[0].read_text()


def test_a_report_without_a_sweep_is_refused(tmp_path):
    with pytest.raises(UserError, match="rlhf report RUN"):
        main(["--outputs", str(tmp_path)])


def test_family_tree_draws_each_ancestor_once_and_names_the_roles(world):
    outputs, sweep = world
    members = compare_runs([sweep], outputs).members
    svg = family_tree(members)
    assert svg.count(">sft<") == svg.count(">collect<") == svg.count(">reward_model</text><text") == 1
    assert svg.count(">ppo<") == 6 and "comparisons" in svg
    assert family_tree([Member(Run(outputs / "sft" / "aa11aa11aa"))]) == ""


def test_many_equal_runs_are_one_box(tmp_path):
    outputs = tmp_path / "outputs"
    sweep = ppo_sweep(outputs, betas=(0.01, 0.1, 1.0), seeds=(0, 1, 2), steps=10)
    assert "ppo × 9" in family_tree(compare_runs([sweep], outputs).members)


def test_curves_of_a_single_run(world, tmp_path):
    outputs, _ = world
    run = next((outputs / "ppo").iterdir())
    assert curves.run_curves(run) == run / "curves.png"
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert curves.run_curves(tmp_path) is None
    from rlhf.storage.metrics_file import MetricsFile

    file = MetricsFile(tmp_path / "metrics.csv")
    for step in range(30):
        file.write(step, {"loss": 3 / (step + 1), "accuracy": step / 30, "learning_rate": 1e-3})
    file.write(30, {"val/loss": 0.2})
    assert curves.run_curves(tmp_path).stat().st_size > 5000


def test_plots_are_deterministic(world):
    outputs, sweep = world
    comparison = compare_runs([sweep], outputs)
    assert plots.effects(comparison, ["val/gold"]) == plots.effects(comparison, ["val/gold"])


def test_the_layout_of_a_plot_equals_that_of_savefig(world):
    def made():
        figure, panels = plots.grid(4, height=2.9)
        for axes in panels:
            axes.plot([1.0, 2000.0], [0.001, 1e6])
            axes.set(title="score", xlabel="step", ylabel="gold reward")
        lines = [line for axes in panels for line in axes.lines]
        plots.legend(figure, lines, ["beta=0.1", "beta=0.2", "beta=0.3", "beta=0.4"])
        return figure

    with figures.style():
        buffer = io.StringIO()
        made().savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        assert buffer.getvalue().endswith(plots._svg(made()))


def test_the_files_of_a_report_are_read_once(world, monkeypatch):
    outputs, sweep = world
    read = []
    for module, name in ((yaml_files, "load"), (run_files, "_read")):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda path, *rest, real=real: [read.append(path.resolve()), real(path, *rest)][1]
        )
    run_directory._load_config.cache_clear()
    main([str(sweep), "--outputs", str(outputs), "--out", str(outputs / "page")])
    assert len(list(outputs.glob("ppo/*/config.yaml"))) == 6 and len(read) == len(set(read))
    assert {path.parent.name for path in read if path.name == "config.yaml"} >= {
        "aa11aa11aa",
        "bb22bb22bb",
        "cc33cc33cc",
    }


def test_effects_of_choices_and_of_two_hyperparameters(tmp_path):
    folders = []
    for i, (adapter, beta) in enumerate((a, b) for a in ("LoRA", "NoAdapter") for b in (0.1, 0.5)):
        config = {"adapter": {"_target_": f"x.{adapter}"}, "objective": {"beta": beta}}
        folders.append(write_run(tmp_path, "dpo", f"{i}1bbccddee", config, {"val/loss": beta + i}))
    comparison = compared(*folders)
    assert comparison.varying == ["adapter", "objective.beta"]
    assert plots.effects(comparison, ["val/loss"]).startswith("<svg")
    assert plots.effects(compared(*folders[:1]), ["val/loss"]) == ""


def test_smoothing_keeps_constants_and_ignores_nan():
    assert figures.smooth([2.0] * 100) == pytest.approx([2.0] * 100)
    assert figures.smooth([1.0, math.nan] + [1.0] * 98)[1] == 1.0


def test_flatten_names_options_by_class_and_omits_output_paths():
    node = {"outputs": "o", "logger": {"a": 1}, "objective": {"_target_": "a.b.DPO", "beta": 0.1}, "list": [1, 2]}
    assert dict(flatten(node)) == {"objective": "DPO", "objective.beta": 0.1, "list": "[1, 2]"}


@pytest.mark.parametrize(
    "mean, error, text",
    [(0.8246, 0.0072, "0.8246 ± 0.0072"), (20.9, 0.88, "20.90 ± 0.88"), (3.0, math.nan, "3"), (0.5, 0.0, "0.5 ± 0")],
)
def test_means_are_formatted_with_their_error(mean, error, text):
    assert with_error(mean, error) == text


def test_short_names_and_values():
    assert short_names(["objective.beta", "a.lr", "b.lr"]) == {"objective.beta": "beta", "a.lr": "a.lr", "b.lr": "b.lr"}
    assert short_names(["rm: objective.margin"]) == {"rm: objective.margin": "rm margin"}
    assert [show(v) for v in (None, 1e-5, 0.1, "x", True)] == ["", "1e-5", "0.1", "x", "True"]
