"""Checks of speed and memory: the device, training steps and sampling."""

import statistics
import time
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks import models
from benchmarks.cases import CASES, Case, count_amounts
from benchmarks.gate import Gate, Job, largest_resident_bytes
from benchmarks.gpu.outcome import Context, Failed, Figures
from benchmarks.gpu.prediction import predict_bytes
from benchmarks.machine import matrix_rate
from benchmarks.ours import command_words
from benchmarks.ours import train as train_ours
from benchmarks.rows import build_rows

WARMUP, STEPS = 2, 4
#: stage -> shape of a step on a GPU
SHAPES: dict[str, dict[str, int]] = {
    "sft": {"batch": 16, "length": 1024},
    "dpo": {"batch": 8, "length": 1024},
    "ppo": {"batch": 32, "prompt": 256, "response": 128},
    "grpo": {"batch": 8, "prompt": 256, "response": 128, "samples": 8},
    "sampling": {"batch": 8, "prompt": 256, "response": 128, "samples": 8},
}


class Finished(Exception):
    """End of the training, raised after the last measured step."""


class Meter(Gate):
    """Gate in the process of the measurement itself: it times the steps, waits for nobody, and ends the training."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.seconds: list[float] = []
        self.lengths: list[float] = []
        self.trained: list[list[int]] = []
        self._passed, self._base, self._began = 0, 0, 0.0

    def end_step(self, **measured: float) -> None:
        """Record the seconds of a step after the warm-up."""
        if self.job.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._passed += 1
        if self._passed > self.job.warmup:
            self.seconds.append(now - self._began)
            self.lengths += [measured["response"]] if "response" in measured else []
        if len(self.seconds) == self.job.steps:
            raise Finished
        self._began = time.perf_counter()


def make_job(name: str, model: str, context: Context) -> tuple[Case, Job]:
    """Return the case of a stage with the shape of a GPU, and its job."""
    folder = models.model_folder("tiny" if context.small else model)
    shape: dict[str, Any] = {} if context.small else SHAPES[name]
    case = replace(CASES[name], model=model, **shape)
    if context.small:
        case = replace(case, batch=2, samples=min(case.samples, 2)).fitted(64)
    from transformers import AutoTokenizer

    rows, _ = build_rows(case, AutoTokenizer.from_pretrained(folder))
    job = Job(
        case=asdict(case),
        side="ours",
        model=str(folder),
        reward=str(models.reward_folder(folder)) if name == "ppo" else None,
        rows=rows,
        device=context.device,
        dtype=context.dtype,
        warmup=1 if context.small else WARMUP,
        steps=1 if context.small else STEPS,
        repeats=1,
        folder=str(context.folder),
    )
    return case, job


def build(context: Context, sizes: list[str]) -> Figures:
    """Build the models and reward models of the measurements, beside checks that do not measure."""
    figures: Figures = {}
    for size in ["tiny"] if context.small else sizes:
        begin = time.perf_counter()
        models.reward_folder(models.model_folder(size))
        figures[f"{size}_seconds"] = time.perf_counter() - begin
    return figures


def train(context: Context, stage: str, model: str) -> Figures:
    """Measure training steps of a stage in bf16: speed, and peak memory beside the one that the plan predicts."""
    case, job = make_job(stage, model, context)
    rate = matrix_rate(context.device, job.dtype, 0.3)
    family = import_module(f"benchmarks.{case.family}")
    data, *words = family.inputs(job)
    figures: Figures = {"matrix_rate_tflops": rate / 1e12}
    figures["predicted_memory_gb"] = predict_bytes(command_words(job, *words), data) / 1e9
    reset_peak(context)
    meter = Meter(job)
    try:
        train_ours(job, meter, *family.inputs(job))
    except Finished:
        pass
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(str(error), figures | peak(context, meter)) from error
    return figures | step_figures(case, job, meter, rate) | peak(context, meter)


class OutOfMemory(Failed):
    """The device's memory is too small."""

    status = "out of memory"


def step_figures(case: Case, job: Job, meter: Meter, rate: float) -> Figures:
    """Return seconds per step, throughput and the share of the matrix rate."""
    length = statistics.mean(meter.lengths) if meter.lengths else None
    amounts = count_amounts(case, models.shape(Path(job.model)), job.rows, length)
    seconds = statistics.median(meter.seconds)
    return {
        "seconds_per_step": seconds,
        "fastest_step_s": min(meter.seconds),
        "slowest_step_s": max(meter.seconds),
        "tokens_per_s": amounts.tokens / seconds,
        "samples_per_s": amounts.samples / seconds,
        "mfu": amounts.flops / seconds / rate,
    }


def reset_peak(context: Context) -> None:
    """Reset the peak of the device's memory."""
    if context.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak(context: Context, meter: Meter) -> Figures:
    """Return the peak memory: allocated on the GPU, else the growth of the process since the meter began."""
    if context.device == "cuda":
        return {"peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9}
    return {"peak_memory_gb": max(0, largest_resident_bytes() - meter._base) / 1e9}


def sampling(context: Context, model: str) -> Figures:
    """Measure sampling in bf16 with our sampler and with ``model.generate``, on the same prompts."""
    from benchmarks.sampling import ours, peer

    figures: Figures = {}
    for side, sample in (("ours", ours), ("generate", peer)):
        case, job = make_job("sampling", model, context)
        rate = matrix_rate(context.device, job.dtype, 0.3)
        reset_peak(context)
        meter = Meter(job)
        with suppress(Finished):
            sample(job, meter)
        found = step_figures(case, job, meter, rate)
        length = statistics.mean(meter.lengths)
        responses = len(job.rows) * case.samples
        new_tokens = responses * length / found["seconds_per_step"]
        figures[side] = {"new_tokens_per_s": new_tokens} | found | peak(context, meter)
    figures["new_tokens_ratio"] = figures["ours"]["new_tokens_per_s"] / figures["generate"]["new_tokens_per_s"]
    return figures


def start(context: Context) -> Figures:
    """Describe the device: name, driver, memory, versions, and the rates of its matrix products."""
    from benchmarks.gpu.machine import describe_device

    figures: Figures = describe_device(context.device)
    dtypes = dict.fromkeys((context.dtype, "fp32"))
    figures["matrix_rate_tflops"] = {dtype: matrix_rate(context.device, dtype, 0.5) / 1e12 for dtype in dtypes}
    return figures
