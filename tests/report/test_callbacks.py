"""Logger, progress, checkpoints and signals in a real Lightning fit with a tiny module."""

import io
import os
import re
import signal
from pathlib import Path

import pytest
import torch

pl = pytest.importorskip("pytorch_lightning")

from rlhf.callbacks.checkpoints import Checkpoints, latest  # noqa: E402
from rlhf.callbacks.progress import Meter, Progress, clock, short  # noqa: E402
from rlhf.callbacks.signals import Signals  # noqa: E402
from rlhf.logger.loggers import MetricsLogger, TensorBoard, loggers  # noqa: E402
from rlhf.storage.metrics_file import read_rows  # noqa: E402


class From(torch.utils.data.Sampler):
    """Sampler with the batch order of the whole run, entered at a step, as in a resumed stage."""

    def __init__(self, start, steps):
        self.start, self.steps = start, steps

    def __iter__(self):
        return iter(range(self.start, self.steps))

    def __len__(self):
        return self.steps


class Tiny(pl.LightningModule):
    """Module with manual optimization, and a batch and noise that are functions of the step, as in stages."""

    name = "tiny"
    progress_metrics = ("loss", "absent")

    def __init__(self, folder, steps, kill_at=None, number=signal.SIGTERM):
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(3, 1)
        self.run_directory, self.total_steps, self.kill_at, self.number = Path(folder), steps, kill_at, number

    def training_step(self, batch, batch_idx):
        torch.manual_seed(int(batch[0]))
        loss = self.layer(torch.randn(4, 3)).pow(2).mean()
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log_dict({"loss": loss, "seen": float(batch[0])})
        if int(batch[0]) == self.kill_at:
            os.kill(os.getpid(), self.number)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.layer.weight.sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(folder, steps=8, kill_at=None, number=signal.SIGTERM, every=None, start=0, resume=None):
    torch.manual_seed(0)
    module = Tiny(folder, steps, kill_at, number)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        val_check_interval=4,
        num_sanity_val_steps=0,
        limit_val_batches=1,
        log_every_n_steps=1,
        logger=loggers(None, folder),
        callbacks=[Signals(), Progress(every_s=1000), Checkpoints(every_n_batches=every)],
        enable_model_summary=False,
        default_root_dir=folder,
        use_distributed_sampler=False,
    )
    data = torch.utils.data.DataLoader(torch.arange(steps), batch_size=1, sampler=From(start, steps))
    val = torch.utils.data.DataLoader(torch.arange(1), batch_size=1)
    trainer.fit(module, data, val, ckpt_path=resume)
    return module


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_exits_75_and_the_resumed_run_is_the_same(tmp_path, number):
    whole = fit(tmp_path / "whole")
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path / "killed", kill_at=4, number=number)
    assert stopped.value.code == 75
    assert {n: signal.getsignal(n) for n in before} == before
    checkpoint = latest(tmp_path / "killed")
    assert checkpoint is not None and checkpoint.name == "step=00000005.ckpt"
    assert [row["step"] for row in read_rows(tmp_path / "killed" / "metrics.csv")] == [0, 1, 2, 3, 4]
    resumed = fit(tmp_path / "killed", start=5, resume=checkpoint)
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    assert (tmp_path / "killed/metrics.csv").read_bytes() == (tmp_path / "whole/metrics.csv").read_bytes()


def test_a_signal_during_the_last_batch_lets_the_run_finish(tmp_path):
    fit(tmp_path, kill_at=7)
    assert len(read_rows(tmp_path / "metrics.csv")) == 8


def test_checkpoints_keep_the_newest(tmp_path):
    fit(tmp_path, every=2)
    # None at the last batch: a run resumed from there would skip the validation at the end.
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step=00000006.ckpt"]
    assert latest(tmp_path / "nothing") is None


def test_validation_metrics_share_the_row_of_their_step(tmp_path):
    fit(tmp_path)
    rows = {int(row["step"]): row for row in read_rows(tmp_path / "metrics.csv")}
    assert sorted(rows) == list(range(8))
    assert [step for step, row in rows.items() if "val/loss" in row] == [3, 7]
    assert all(row["seen"] == step for step, row in rows.items())


def test_plain_progress_lines(tmp_path, capsys):
    fit(tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny")]
    assert len(lines) == 1 and re.match(r"tiny 8/8 \(100%\) .*/s, 0:0\d  loss \d\.\d+$", lines[0])


def test_meter_prints_lines_into_a_pipe_with_the_time_left():
    out = io.StringIO()
    with Meter("collect", total=4, unit="prompt", every_s=0, stream=out) as meter:
        for score in (0.25, 0.5, 0.75, 1.0):
            meter.advance(score=score)
    lines = out.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[1].startswith("collect 2/4 (50%)") and "left" in lines[1] and lines[1].endswith("score 0.500")
    assert lines[-1].startswith("collect 4/4 (100%)") and "left" not in lines[-1]


def test_meter_on_a_terminal_draws_one_live_line():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    os.environ.pop("NO_COLOR", None)
    with Meter("ppo: scoring", total=2, stream=(quick := io.StringIO()), always=False) as meter:
        meter.advance(2)
    assert quick.getvalue() == ""  # finished before the first progress line was due
    with Meter("ppo: scoring", total=2, every_s=0, stream=(slow := io.StringIO()), always=False) as meter:
        meter.advance(2)
    assert slow.getvalue().splitlines()[-1].startswith("ppo: scoring 2/2 (100%)")
    with Meter("ppo", total=2, stream=out) as meter:
        meter._shown = 0.0
        meter.advance(reward=0.5)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "ppo" in text and "reward 0.500" in text
    assert text.splitlines()[-1].startswith("ppo 1/2")


def test_metrics_are_always_written_beside_other_loggers(tmp_path):
    assert [type(logger) for logger in loggers(None, tmp_path)] == [MetricsLogger]
    assert [type(logger) for logger in loggers(MetricsLogger, tmp_path)] == [MetricsLogger]
    assert [type(logger) for logger in loggers(TensorBoard, tmp_path)] == [MetricsLogger, TensorBoard]
    loggers(TensorBoard, tmp_path)[1].log_metrics({"x": 1.0}, step=0)


@pytest.mark.parametrize("name, package", [("WeightsAndBiases", "wandb"), ("MLFlow", "mlflow")])
def test_a_missing_logging_package_is_refused_with_the_install_command(tmp_path, name, package):
    import importlib.util

    import rlhf.logger.loggers
    from rlhf.errors import UserError

    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(UserError, match=f"pip install {package}"):
        loggers(getattr(rlhf.logger.loggers, name), tmp_path)


@pytest.mark.parametrize(
    "value, text",
    [(0.0, "0"), (0.4123, "0.412"), (12.34, "12.3"), (123.4, "123"), (1.2e-5, "1.2e-05"), (2e4, "2.0e+04")],
)
def test_numbers_are_shortened(value, text):
    assert short(value) == text


def test_durations_are_formatted():
    assert clock(62) == "1:02" and clock(3723) == "1:02:03"


def test_metrics_are_written_before_their_checkpoint(tmp_path, monkeypatch):
    rows = []
    saving = pl.Trainer.save_checkpoint

    def save(trainer, path, *args, **kwargs):
        rows.append([row["step"] for row in read_rows(tmp_path / "metrics.csv")])
        saving(trainer, path, *args, **kwargs)

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", save)
    fit(tmp_path, every=3)
    assert rows == [[0, 1, 2], [0, 1, 2, 3, 4, 5]]
    (tmp_path / "whole").mkdir()
    fit(tmp_path / "whole")
    assert (tmp_path / "metrics.csv").read_bytes() == (tmp_path / "whole/metrics.csv").read_bytes()
