"""Logging services get the config, the run's identity and its samples, besides the metrics."""

import json
from types import SimpleNamespace

import pytest

from rlhf.logger.loggers import MetricsLogger, MLFlow, TensorBoard, WeightsAndBiases, log_config, log_samples

CONFIG = {"seed": 3, "objective": {"_target_": "x.DPO", "beta": 0.1}, "data": {"source": ["a", "b"]}}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "dpo" / "ab12"
    folder.mkdir(parents=True)
    (folder / "lineage.json").write_text(json.dumps({"fingerprint": "ab12" * 16, "parents": ["cd34"]}))
    (folder / "samples.jsonl").write_text('{"prompt": "größer?", "response": "ja"}\n', encoding="utf-8")
    return folder


def test_tensorboard_gets_config_metrics_and_samples(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoard(run)
    log_config([MetricsLogger(run), logger], CONFIG, run)
    log_samples([MetricsLogger(run), logger], run)
    logger.save()
    logger.finalize("success")
    found = EventAccumulator(str(run / "tensorboard")).Reload()
    (event,) = found.Tensors("samples/text_summary")
    assert "größer?" in event.tensor_proto.string_val[0].decode()
    written = (run / "tensorboard" / "hparams.yaml").read_text(encoding="utf-8")
    assert "objective.beta: 0.1" in written and "fingerprint: ab12" in written and "parents: cd34" in written


def test_mlflow_starts_with_its_default_store(run, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    logger = MLFlow(run)
    log_config([logger], CONFIG, run)
    log_samples([logger], run)
    logger.log_metrics({"loss": 1.5}, 0)
    found = logger.experiment.get_run(logger.run_id)
    assert found.data.params["objective.beta"] == "0.1" and found.data.params["fingerprint"] == "ab12" * 16
    assert found.data.metrics["loss"] == 1.5
    (file,) = (run / "mlflow").rglob("samples.txt")
    assert "größer?" in file.read_text(encoding="utf-8")


def test_wandb_gets_config_and_samples(run, monkeypatch):
    # Without the package: the two calls with which Lightning's logger reaches it.
    logger = WeightsAndBiases.__new__(WeightsAndBiases)
    given = {}
    monkeypatch.setattr("pytorch_lightning.loggers.WandbLogger.log_hyperparams", lambda _, params: given.update(params))
    monkeypatch.setattr(
        "pytorch_lightning.loggers.WandbLogger.log_text", lambda _, key, **table: given.update({key: table})
    )
    log_config([logger], CONFIG, run)
    log_samples([logger], run)
    assert given["objective.beta"] == 0.1 and given["data.source.1"] == "b"
    assert given["samples"] == {"columns": ["line"], "data": [['{"prompt": "größer?", "response": "ja"}']]}
    log_samples([SimpleNamespace()], run)  # a user's logger without text support
