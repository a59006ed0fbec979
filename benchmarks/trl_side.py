"""The peer's side of the cases: a Trainer of TRL on given token rows, gated after each optimizer step.

It runs with TRL 1.16 and with TRL 0.24 and transformers 4, so it imports nothing of rlhf.
"""

import warnings
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.gate import Gate, Job

LEARNING_RATE = 1e-5
LORA_ALPHA = 2  # times the rank, as conf/adapter/lora.yaml


class GateCallback(TrainerCallback):
    """Callback that stops at the gate after each optimizer step."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the step, with the mean length of the responses of the last step logged, if it sampled some."""
        last = state.log_history[-1] if state.log_history else {}
        length = last.get("completions/mean_length")
        self.gate.end_step(**({} if length is None else {"response": float(length)}))


def training_arguments(job: Job) -> dict[str, Any]:
    """Return the arguments of TrainingArguments that all cases share.

    Defaults of TRL, except: no checkpoints, no reports, no activation checkpointing (our stages have none either), and
    metrics logged after each step, as ours are.
    """
    warnings.filterwarnings("ignore")
    return {
        "output_dir": job.folder,
        "max_steps": job.total,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "bf16": job.dtype == "bf16",
        "use_cpu": job.device == "cpu",
    }


def weights_dtype(job: Job) -> torch.dtype:
    """Return the format of the weights."""
    return torch.bfloat16 if job.dtype == "bf16_true" else torch.float32


def lora_config(job: Job, task: str = "CAUSAL_LM") -> Any:
    """Return PEFT's config of the case's adapter, or None."""
    rank = job.case["lora"]
    if rank is None:
        return None
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=LORA_ALPHA * rank, target_modules="all-linear", task_type=task)


def attended(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """Return the rows of a batch without padding."""
    return [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]
