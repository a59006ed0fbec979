"""Runs that enter the numbers of a report, and notes on what the numbers leave out."""

import csv
import json
import math

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure  # noqa: E402

from rlhf.cli.report import main  # noqa: E402
from rlhf.errors import UserError  # noqa: E402
from rlhf.report import plots  # noqa: E402
from rlhf.report.html import write_report  # noqa: E402
from rlhf.report.members import Member, find_runs  # noqa: E402
from rlhf.report.sweep import Comparison, cell  # noqa: E402
from rlhf.runs.run_directory import Run  # noqa: E402
from rlhf.stage import figures  # noqa: E402
from rlhf.storage.metrics_file import MetricsFile, distinct_names  # noqa: E402
from tests.report.fake_runs import write_run  # noqa: E402


def compared(*folders):
    return Comparison([Member(Run(folder)) for folder in folders], [])


def runs_of(outputs, rows, logged=()):
    """Write runs of (beta, seed, status, metrics); unfinished ones have their metrics in metrics.csv alone."""
    folders = []
    for i, (beta, seed, status, metrics) in enumerate(rows):
        config = {"seed": seed, "objective": {"_target_": "x.DPO", "beta": beta}}
        folder = write_run(outputs, "dpo", f"{i:02d}abbccddee", config, metrics, status=status)
        file = MetricsFile(folder / "metrics.csv")
        for step, row in logged or [(9, metrics)]:
            file.write(step, row)
        folders.append(folder)
    return folders


def test_a_failed_run_is_excluded_from_means(tmp_path):
    comparison = compared(*runs_of(tmp_path, [
        (0.1, 0, "finished", {"val/accuracy": 0.6}), (0.1, 1, "finished", {"val/accuracy": 0.8}),
        (0.1, 2, "failed", {"val/accuracy": 0.1}), (0.1, 3, "stopped", {"val/accuracy": 0.2}),
        (0.5, 0, "failed", {"val/accuracy": 0.99}), (0.9, 0, "stopped", {"val/accuracy": 0.95}),
    ]))  # fmt: skip
    first, failed, stopped = comparison.groups
    assert first.mean("val/accuracy") == pytest.approx(0.7) and first.error("val/accuracy") == pytest.approx(0.1)
    assert math.isnan(failed.mean("val/accuracy")) and cell(failed, "val/accuracy") == ""
    assert stopped.mean("val/accuracy") == 0.95  # the newest value of a run that can be resumed; it is never best
    assert comparison.best("val/accuracy") is None
    assert comparison.left_out(["val/accuracy"]) == [
        "beta=0.1: 2 of 4 runs not in the means (1 failed, 1 stopped)",
        "beta=0.5: 1 of 1 runs not in the means (1 failed)",
    ]


def test_nan_is_counted_and_never_best(tmp_path, capsys):
    folders = runs_of(tmp_path / "outputs", [
        (0.1, 0, "finished", {"val/accuracy": 0.9}), (0.1, 1, "finished", {"val/accuracy": math.nan}),
        (0.5, 0, "finished", {"val/accuracy": 0.5}), (0.5, 1, "finished", {"val/accuracy": 0.7}),
        (0.9, 0, "finished", {"val/accuracy": math.nan}),
    ])  # fmt: skip
    comparison = compared(*folders)
    assert [cell(group, "val/accuracy") for group in comparison.groups] == ["0.9 (1 nan)", "0.60 ± 0.10", "nan"]
    assert comparison.best("val/accuracy") is None
    assert main([*map(str, folders), "--outputs", str(tmp_path / "outputs")]) == 0
    out = capsys.readouterr().out
    assert "beta=0.1: val/accuracy is nan or infinite in 1 of 2 runs, not in the mean" in out
    (page,) = (tmp_path / "outputs" / "reports").glob("*/report.html")
    assert "beta=0.9: val/accuracy is nan or infinite in 1 of 1 runs" in page.read_text(encoding="utf-8")


def test_the_best_group_is_chosen_by_one_metric_beyond_noise(tmp_path):
    def rows(*values):
        return [
            (b, s, "finished", {"val/gold": v, "val/accuracy": 1 - v}) for b, vs in values for s, v in enumerate(vs)
        ]

    clear = compared(*runs_of(tmp_path / "a", rows((0.1, (0.5, 0.52)), (0.5, (0.8, 0.82)))))
    assert clear.best("val/gold") is clear.groups[1]
    page = write_report(clear, tmp_path / "report.html", "x").read_text(encoding="utf-8")
    assert page.count("num best") == 1 and clear.main_metrics(1) == ["val/gold"]
    noisy = compared(*runs_of(tmp_path / "b", rows((0.1, (0.5, 0.7)), (0.5, (0.6, 0.8)))))
    assert noisy.best("val/gold") is None


def test_reward_and_kl_come_from_the_same_prompts(tmp_path):
    metrics = {"gold": 0.5, "kl": 9.0, "val/gold": 0.4, "val/kl": 7.0}
    (one,) = runs_of(tmp_path / "a", [(0.1, 0, "finished", metrics)])
    assert plots.reward_and_kl_names(compared(one)) == ("val/gold", "val/kl")
    (two,) = runs_of(tmp_path / "b", [(0.1, 0, "finished", {"val/gold": 0.4, "gold": 0.5, "kl": 9.0})])
    assert plots.reward_and_kl_names(compared(two)) == ("gold", "kl")


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_single_validation_point_is_visible(tmp_path, seeds):
    rows = [(0.1, seed, "finished", {"val/accuracy": 0.5 + seed / 10}) for seed in range(seeds)]
    comparison = compared(*runs_of(tmp_path, rows))
    axes = Figure().subplots()
    plots._group_curve(axes, comparison.groups[0], "val/accuracy", "red")
    marked = [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert [list(line.get_ydata()) for line in marked] == [[pytest.approx(0.5 + (seeds - 1) / 20)]]


def test_runs_without_common_steps_are_drawn_separately(tmp_path):
    folders = runs_of(tmp_path, [(0.1, 0, "finished", {})], logged=[(3, {"loss": 1.0})])
    folders += runs_of(tmp_path / "b", [(0.1, 1, "finished", {})], logged=[(5, {"loss": 2.0})])
    axes = Figure().subplots()
    plots._group_curve(axes, compared(*folders).groups[0], "loss", "red")
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [[3], [5]]


@pytest.mark.parametrize("count", [2, 24, 40])
def test_legends_are_complete(count):
    labels = [f"a rather long name of a setting={i}, learning_rate={i}e-5, adapter=LoRA" for i in range(count)]
    with figures.style():
        figure, (panel,) = plots.grid(1, height=2.9)
        handles = [panel.plot([0, 1], [i, i])[0] for i in range(count)]
        plots.legend(figure, handles, labels)
        figure.draw_without_rendering()
        box, page = figure.legends[0].get_window_extent(), figure.bbox
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        assert panel.get_window_extent().height > 0.5 * figure.dpi * 2.9
        assert "".join(text.get_text() for text in figure.legends[0].get_texts()).count("setting=") == count


def test_a_metric_named_like_a_column_has_its_own_column(tmp_path):
    assert distinct_names(["run", "status", "value"], ["loss", "value"]) == [
        "run",
        "status",
        "value",
        "loss",
        "metric.value",
    ]
    comparison = compared(*runs_of(tmp_path, [(0.1, 0, "finished", {"status": 1.0, "run": 2.0, "loss": 3.0})]))
    comparison.write_csv(tmp_path / "report.csv")
    with (tmp_path / "report.csv").open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["status"], row["metric.status"], row["metric.run"], row["loss"]) == ("finished", "1.0", "2.0", "3.0")


def test_omitted_rows_are_reported(tmp_path, capsys):
    metrics = {f"val/accuracy_{i}": 0.5 for i in range(5)} | {f"loss_{i}": 1.0 for i in range(5)}
    folders = runs_of(tmp_path / "outputs", [(b / 10, 0, "finished", metrics | {"gold": b / 10}) for b in range(1, 9)])
    for folder in folders:
        lines = [json.dumps({"prompt": f"question {i}", "response": "answer"}) for i in range(5)]
        (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    comparison = compared(*folders)
    page = write_report(comparison, tmp_path / "report.html", "x").read_text(encoding="utf-8")
    assert "6 of 8 settings and 3 of 5 prompts; all are in samples.jsonl of the runs." in page
    assert f"{len(comparison.main_metrics(8))} of 11 metrics; all are in report.csv." in page
    main([*map(str, folders), "--outputs", str(tmp_path / "outputs")])
    assert f"{len(comparison.main_metrics(6))} of 11 metrics; report.csv has all" in capsys.readouterr().out


def test_links_that_leave_a_run_or_its_outputs_are_not_followed(tmp_path):
    (mine,) = runs_of(tmp_path / "private", [(0.1, 0, "finished", {"loss": 1.0})])
    outputs = tmp_path / "outputs"
    (good,) = runs_of(outputs, [(0.1, 0, "finished", {"loss": 2.0})])
    bad = write_run(outputs, "sft", "bb" * 5, {}, {"loss": 3.0})
    (tmp_path / "secret").write_text("password: 1\n")
    (bad / "config.yaml").unlink()
    (bad / "config.yaml").symlink_to(tmp_path / "secret")
    sweep = outputs / "sweeps" / "2026-01-01-x"
    for name, target in (("000", good), ("001", mine), ("002", bad)):
        (sweep / name).mkdir(parents=True)
        (sweep / name / "run").symlink_to(target)
    assert [run.folder.resolve() for run in find_runs(sweep, tmp_path / "elsewhere")] == [good.resolve()]
    with pytest.raises(
        UserError, match="config.yaml is a link to .*secret, outside of the run; replace the link by the file"
    ):
        find_runs(bad, outputs)
