"""metrics.csv: rows per step, new columns, kill and resume."""

import math
from pathlib import Path

import pytest

from rlhf.storage.metrics_file import MetricsFile, read_rows, read_series


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.csv"


def test_rows_are_written_immediately(path):
    file = MetricsFile(path)
    file.write(0, {"loss": 1.5, "kl": 0.0})
    assert path.read_text() == "step,loss,kl\n0,1.5,0\n"
    file.write(1, {"loss": 1.25, "kl": 0.125})
    assert path.read_text() == "step,loss,kl\n0,1.5,0\n1,1.25,0.125\n"


def test_metrics_of_one_step_share_a_row(path):
    file = MetricsFile(path)
    file.write(0, {"loss": 2.0})
    file.write(4, {"loss": 1.0})
    file.write(4, {"val/loss": 3.0})
    file.write(4, {"loss": 0.5})
    file.write(5, {"loss": 0.25})
    assert read_rows(path) == [
        {"step": 0, "loss": 2.0},
        {"step": 4, "loss": 0.5, "val/loss": 3.0},
        {"step": 5, "loss": 0.25},
    ]


def test_a_new_column_leaves_earlier_cells_empty(path):
    file = MetricsFile(path)
    for step in range(3):
        file.write(step, {"a": step})
    file.write(3, {"b": 7.0})
    assert path.read_text() == "step,a,b\n0,0,\n1,1,\n2,2,\n3,,7\n"
    assert read_series(path) == {"a": ([0, 1, 2], [0, 1, 2]), "b": ([3], [7])}


def test_resume_drops_rows_after_the_checkpoint(path):
    first = MetricsFile(path)
    for step in range(10):
        first.write(step, {"loss": 10.0 - step})
    resumed = MetricsFile(path)
    resumed.write(6, {"loss": 4.0})
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3, 4, 5, 6]
    resumed.write(7, {"loss": 3.0})
    whole = MetricsFile(path.with_name("whole.csv"))
    for step in range(8):
        whole.write(step, {"loss": 10.0 - step})
    assert path.read_bytes() == path.with_name("whole.csv").read_bytes()


def test_a_line_truncated_by_a_kill_is_ignored_and_replaced(path):
    file = MetricsFile(path)
    file.write(0, {"loss": 1.0})
    file.write(1, {"loss": 2.0})
    path.write_text(path.read_text()[:-2])
    assert read_rows(path) == [{"step": 0, "loss": 1.0}]
    MetricsFile(path).write(1, {"loss": 2.0})
    assert read_rows(path) == [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 2.0}]


def test_float32_comes_back_unchanged_and_nan_is_kept(path):
    import struct

    value = struct.unpack("f", struct.pack("f", 0.1))[0]
    MetricsFile(path).write(0, {"x": value, "bad": math.nan, "worse": math.inf})
    row = read_rows(path)[0]
    assert struct.pack("f", row["x"]) == struct.pack("f", value)
    assert math.isnan(row["bad"]) and row["worse"] == math.inf


def test_a_missing_file_has_no_rows(path):
    assert read_rows(path) == [] and read_series(path) == {}


def test_a_row_that_is_logged_again_is_never_missing(tmp_path, monkeypatch):
    """A kill between truncating the file and rewriting the row left a checkpoint whose row was gone."""
    file = MetricsFile(tmp_path / "metrics.csv")
    for step in range(3):
        file.write(step, {"loss": 1.5})
    whole, seen = file.path.read_bytes(), []
    opened = Path.open

    class Watched:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.stream.close()

        def __getattr__(self, name):
            def call(*given):
                result = getattr(self.stream, name)(*given)
                self.stream.flush()
                with open(file.path, "rb") as now:
                    seen.append(now.read())
                return result

            return call

    monkeypatch.setattr(Path, "open", lambda path, *given, **named: Watched(opened(path, *given, **named)))
    file.write(2, {"loss": 1.5})
    assert seen == []  # the same row
    file.write(2, {"loss": 7})
    monkeypatch.undo()
    assert len(seen) == 3 and all(content.count(b"\n2,") == 1 for content in seen)
    assert file.path.read_bytes() == whole.replace(b"2,1.5", b"2,7")
