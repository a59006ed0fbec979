"""Figures of `rlhf report --plot`: the data on the axes equals that of the runs."""

import pytest

pytest.importorskip("matplotlib")

from rlhf.cli.report import main  # noqa: E402
from rlhf.errors import UserError  # noqa: E402
from rlhf.report import figure  # noqa: E402
from rlhf.report.sweep import compare_runs  # noqa: E402
from rlhf.stage import figures  # noqa: E402
from tests.report.fake_runs import ppo_sweep, write_run  # noqa: E402


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("figure") / "outputs"
    return outputs, ppo_sweep(outputs, betas=(0.01, 0.1, 1.0), seeds=(0, 1), steps=40)


@pytest.fixture
def drawn(monkeypatch):
    """Collect the figures as they were before they were written."""
    kept = []

    def keep(made, path):
        kept.append(made)
        path.write_bytes(b"image")
        return path

    monkeypatch.setattr(figures, "save", keep)
    return kept


def test_final_metrics_are_plotted_against_a_hyperparameter(world, drawn, tmp_path):
    outputs, sweep = world
    comparison = compare_runs([sweep], outputs)
    figure.write_figure(comparison, tmp_path / "a.png", "beta", ["val/gold"])
    (axes,) = drawn[0].axes
    line = axes.containers[0].lines[0]
    assert list(line.get_xdata()) == [0.01, 0.1, 1.0] and axes.get_xscale() == "log"
    assert list(line.get_ydata()) == [group.mean("val/gold") for group in comparison.groups]


def test_points_plotted_against_a_metric_are_labelled_with_the_swept_value(world, drawn, tmp_path):
    outputs, sweep = world
    comparison = compare_runs([sweep], outputs)
    figure.write_figure(comparison, tmp_path / "a.svg", "kl", ["val/gold", "score"])
    assert len(drawn[0].axes) == 2
    axes = drawn[0].axes[0]
    assert list(axes.containers[0].lines[0].get_xdata()) == [group.mean("kl") for group in comparison.groups]
    assert [text.get_text() for text in axes.texts] == ["0.01", "0.1", "1"]


@pytest.mark.parametrize("x", ["step", "kl"])
def test_each_group_is_a_mean_with_a_band_over_training(world, drawn, tmp_path, x):
    outputs, sweep = world
    comparison = compare_runs([sweep], outputs)
    figure.write_figure(comparison, tmp_path / "a.png", x, ["score"], along=True)
    (axes,) = drawn[0].axes
    named = [line for line in axes.lines if not line.get_label().startswith("_")]
    assert [line.get_label() for line in named] == [group.label for group in comparison.groups]
    assert len(axes.collections) == 3  # the bands
    first = comparison.groups[0]
    ends = [figures.smooth(member.series["score"][1])[-1] for member in first.members]
    assert named[0].get_ydata()[-1] == pytest.approx(sum(ends) / 2)


def test_the_command_writes_the_figure(world, tmp_path, capsys):
    outputs, sweep = world
    words = [str(sweep), "--outputs", str(outputs), "--out", str(tmp_path), "--plot", str(tmp_path / "made/here.png")]
    assert main([*words, "--x", "beta", "--y", "val/gold"]) == 0
    assert str(tmp_path / "made/here.png") in capsys.readouterr().out
    assert (tmp_path / "made/here.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "begins"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")])
def test_each_file_type_is_written_deterministically(world, tmp_path, name, begins):
    comparison = compare_runs([world[1]], world[0])
    for folder in ("one", "two"):
        figure.write_figure(comparison, tmp_path / folder / name, "beta", ["val/gold"])
    first, second = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
    assert first.startswith(begins) and first == second


@pytest.mark.parametrize(
    ("name", "x", "y", "says"),
    [
        ("a.jpg", "step", ["score"], r"a.jpg: its name must end in \.png, \.svg or \.pdf; type --plot NAME"),
        ("a.png", "step", [], "--plot: needs a metric to draw; type --y METRIC"),
        ("a.png", "beta", ["scor"], "--y scor: is not among the final metrics .did you mean score"),
        ("a.png", "nothing", ["score"], "--x nothing: is not among .*or a swept hyperparameter: objective.beta"),
    ],
)
def test_invalid_figures_are_refused(world, tmp_path, name, x, y, says):
    outputs, sweep = world
    with pytest.raises(UserError, match=says):
        figure.write_figure(compare_runs([sweep], outputs), tmp_path / name, x, y)


def test_the_policy_before_training_is_marked_at_zero_kl(drawn, tmp_path):
    for i, beta in enumerate((0.1, 0.3)):
        metrics = {"after_kl": 3.0 - i, "after_gold": 0.7 + i / 10, "gold_difference": 0.3 + i / 10}
        write_run(tmp_path, "ppo", f"a{i}bbccddee", {"objective": {"beta": beta}}, metrics)
    figure.write_figure(compare_runs([tmp_path / "ppo"], tmp_path), tmp_path / "a.png", "after_kl", ["after_gold"])
    (mark,) = [line for line in drawn[0].axes[0].lines if line.get_label() == "before"]
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([0], [pytest.approx(0.4)])
