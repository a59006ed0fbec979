"""Loggers: `metrics.csv`, which every run writes, and services that can be used beside it (config group `logger`).

Each is built from its YAML as a partial that takes the run directory: `logger(folder)`.
"""

import os
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from rlhf.errors import UserError
from rlhf.runs.run_directory import Run
from rlhf.storage.metrics_file import MetricsFile
from rlhf.storage.plain import Plain, leaves


class MetricsLogger(Logger):
    """Logger that appends a stage's metrics to `RUN/metrics.csv`; safe to kill and to resume.

    Steps are Lightning's: the number of training batches before the one that logged, from 0.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.file = MetricsFile(self.folder / "metrics.csv")
        self._last_step = -1

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """Empty: there is one file per run."""
        return ""

    @property
    def save_dir(self) -> str:
        """Run directory."""
        return str(self.folder)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write one row; without a step it belongs to the last one logged."""
        step = max(self._last_step, 0) if step is None else int(step)
        self._last_step = step
        self.file.write(step, metrics)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run directory already holds config.yaml."""


class TensorBoard(TensorBoardLogger):
    """TensorBoard event files in `RUN/tensorboard`; view them with `tensorboard --logdir outputs`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(save_dir=str(folder), name="", version="tensorboard")

    def log_text(self, name: str, text: str) -> None:
        """Write a text as Markdown code."""
        self.experiment.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()))


class WeightsAndBiases(WandbLogger):
    """Weights & Biases run whose id is the fingerprint, so that a resumed run continues the same curve.

    Raises:
        UserError: The wandb package is missing.
    """

    def __init__(
        self,
        folder: Path,
        project: str = "rlhf",
        entity: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        mode: Literal["online", "offline"] = "online",
    ) -> None:
        folder = Path(folder)
        try:
            super().__init__(
                project=project,
                entity=entity,
                group=group,
                tags=tags,
                offline=mode == "offline",
                save_dir=str(folder),
                name=f"{folder.parent.name}/{folder.name}",
                id=folder.name,
                resume="allow",
            )
        except ModuleNotFoundError as error:
            raise UserError(
                "needs the wandb package", fix="type pip install wandb", option="logger", value="wandb"
            ) from error

    def log_text(self, name: str, text: str) -> None:  # type: ignore[override]
        """Write a text as a table of its lines."""
        super().log_text(name, columns=["line"], data=[[line] for line in text.splitlines()])


class MLFlow(MLFlowLogger):
    """MLflow run; without a tracking server its files go to `RUN/mlflow`.

    Raises:
        UserError: The mlflow package is missing.
    """

    def __init__(self, folder: Path, experiment: str = "rlhf", tracking_uri: str | None = None) -> None:
        folder = Path(folder)
        if tracking_uri is None:
            # MLflow refuses its file store without this; its databases need packages that mlflow-skinny lacks.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        try:
            super().__init__(
                experiment_name=experiment,
                run_name=f"{folder.parent.name}/{folder.name}",
                tracking_uri=tracking_uri or (folder / "mlflow").absolute().as_uri(),
            )
        except ModuleNotFoundError as error:
            raise UserError(
                "needs the mlflow package", fix="type pip install mlflow-skinny", option="logger", value="mlflow"
            ) from error

    def log_text(self, name: str, text: str) -> None:
        """Write a text as an artifact."""
        self.experiment.log_text(self.run_id, text, f"{name}.txt")


@rank_zero_only
def log_config(chosen: Iterable[Logger], config: Plain, folder: Path) -> None:
    """Log the resolved config to services, flattened, with the run's fingerprint and its parents."""
    lineage = Run(folder).lineage
    flat = {key: value for key, value in leaves(config)}
    flat |= {"fingerprint": lineage.get("fingerprint", folder.name), "parents": ", ".join(lineage.get("parents") or ())}
    for logger in chosen:
        if not isinstance(logger, MetricsLogger):
            logger.log_hyperparams(flat)


@rank_zero_only
def log_samples(chosen: Iterable[Logger], folder: Path) -> None:
    """Log the samples of a run, if it has any, to services that accept text."""
    file = folder / "samples.jsonl"
    for logger in chosen if file.is_file() else ():
        if hasattr(logger, "log_text"):
            logger.log_text("samples", file.read_text(encoding="utf-8"))


def loggers(chosen: Callable[[Path], Logger] | None, folder: Path) -> list[Logger]:
    """Return the loggers of a run: always `metrics.csv`, and the service of the config group `logger`, if any.

    Args:
        chosen: The group's partial, called with the run directory; None for no service.
        folder: The run directory.
    """
    metrics = MetricsLogger(folder)
    if chosen is None:
        return [metrics]
    logger = chosen(folder)
    return [metrics] if isinstance(logger, MetricsLogger) else [metrics, logger]
