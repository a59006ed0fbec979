"""Our side of the cases: the stage of the command `rlhf`, on given token rows, gated after each batch."""

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from benchmarks.gate import Gate, Job
from rlhf.console import silence_libraries
from rlhf.data.collate import PairBatch
from rlhf.data.encoding import encode_prompt
from rlhf.data.load_report import LoadReport
from rlhf.data.record_encoder import EncodeReport, RecordEncoder
from rlhf.data.records import Message, Prompt, Record, RecordName
from rlhf.data.split import Split
from rlhf.running.build import build_stage, build_trainer
from rlhf.testing import compose_config

LEARNING_RATE = 1e-5


class TokenRows(RecordEncoder):
    """Encoder of records whose tokens are given."""

    def __init__(self, record: RecordName, rows: Sequence[Any]) -> None:
        super().__init__(record, "benchmark", 1 << 20, None, 0.0, streaming=False)
        self.rows = rows

    def place(self, record: Record) -> str:
        """Return "": the records are in no file."""
        return ""

    def encode(self, tokenizer: Any, records: Sequence[Record]) -> tuple[Sequence[Any], EncodeReport]:
        """Return the given rows for the training records."""
        rows = self.rows if records else []
        return rows, EncodeReport(kept=len(rows), tokens=sum(len(row) for row in rows))


def split_of(record: RecordName, records: Sequence[Record], rows: Sequence[Any] = ()) -> Split:
    """Return data for a stage: records with given token rows (prompts have none), nothing held out."""
    return Split(records, (), LoadReport("benchmark", train=len(records)), TokenRows(record, rows))


def prompts_of(job: Job) -> Split:
    """Return the prompts of a job."""
    return split_of("prompt", [Prompt(tuple(Message(**message) for message in row["messages"])) for row in job.rows])


def rows_of(part: Any, policy: Any) -> list[list[int]]:
    """Return the rows of a micro-batch without padding; a prompt is tokenized as the sampler does."""
    if isinstance(part, Prompt):
        return [encode_prompt(policy.tokenizer, part.messages)]
    tokens = part.tokens if isinstance(part, PairBatch) else part
    return [ids[keep].tolist() for ids, keep in zip(tokens.ids, tokens.attention_mask, strict=True)]


@dataclass
class GateCallback(pl.Callback):
    """Callback that stops at the gate after each training batch."""

    gate: Gate

    def on_train_batch_start(self, trainer: pl.Trainer, stage: Any, batch: Any, batch_idx: int) -> None:
        """Record the rows of a batch of the warm-up."""
        if self.gate.warming:
            self.gate.record_rows([ids for part in batch for ids in rows_of(part, stage.policy)])

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Report the step, with the mean length of its responses if it sampled some."""
        length = trainer.callback_metrics.get("length")
        self.gate.end_step(**({} if length is None else {"response": float(length)}))


def command_words(job: Job, *overrides: str) -> list[str]:
    """Return the overrides of a case's command: those given and those that all cases share."""
    lora = job.case["lora"]
    return [
        *overrides,
        "stage.micro_batch_size=null",  # one pass over the batch, as on the peer's side
        f"precision={job.dtype}",
        f"trainer={'gpu' if job.device == 'cuda' else 'cpu'}",
        "trainer.limit_val_batches=0",
        "callbacks=quiet",
        "callbacks.checkpoints=null",
        "scheduler=constant",
        f"optimizer.lr={LEARNING_RATE}",
        *(("adapter=lora", f"adapter.rank={lora}") if lora else ()),
    ]


def train(job: Job, gate: Gate, data: Split, *overrides: str) -> None:
    """Train a stage as the command does, until the parent ends the process.

    Args:
        job: The job.
        gate: Its gate.
        data: Data of the group ``data``.
        overrides: Overrides of the command, the stage among them.
    """
    silence_libraries()
    warnings.filterwarnings("ignore")
    config = compose_config(*command_words(job, *overrides))
    gate.start()
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp(dir=job.folder))
    stage = build_stage(config, folder, loaded={"data": data})
    trainer, _ = build_trainer(config, folder)
    trainer.callbacks.append(GateCallback(gate))  # type: ignore[attr-defined]
    trainer.fit(stage)
