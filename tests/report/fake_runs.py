"""Run directories as the pipeline writes them, without any training."""

import json
import math
import random
from pathlib import Path

from omegaconf import OmegaConf

from rlhf.storage.metrics_file import MetricsFile


def write_run(outputs: Path, stage: str, name: str, config: dict, metrics: dict, parents=(), status="finished", **more):
    """Write a run directory and return it; `parents` are (role, folder) pairs."""
    folder = outputs / stage / name
    folder.mkdir(parents=True)
    ancestors, inputs = {}, {}
    for role, parent in parents:
        lineage = json.loads((parent / "lineage.json").read_text())
        inputs.setdefault(role, []).append(lineage["fingerprint"])
        own = {key: lineage[key] for key in ("stage", "folder", "inputs", "parents")}
        ancestors |= lineage["ancestors"] | {lineage["fingerprint"]: own}
    lineage = {
        "fingerprint": name * 4,
        "stage": stage,
        "folder": str(folder),
        "inputs": inputs,
        "parents": sorted(f for found in inputs.values() for f in found),
        "ancestors": ancestors,
    }
    (folder / "lineage.json").write_text(json.dumps(lineage))
    (folder / "status.json").write_text(json.dumps({"status": status, "pid": -1, "host": "elsewhere"}))
    OmegaConf.save(
        OmegaConf.create({"stage": {"_target_": f"x.{stage.title()}", "name": stage}, **config}), folder / "config.yaml"
    )
    if status == "finished":
        summary = {"stage": stage, "metrics": metrics, "wall_s": 93.0, "tokens_per_s": 5120.0, **more}
        summary["peak_memory_bytes"] = {"cpu": 7.4e8}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def ppo_sweep(outputs: Path, betas=(0.005, 0.02, 0.1, 0.5), seeds=(0, 1, 2), steps=60) -> Path:
    """Write a sweep of PPO over beta and seed, on one SFT run and one reward model; return the sweep directory."""
    sft = write_run(outputs, "sft", "aa11aa11aa", {"seed": 0, "optimizer": {"lr": 1e-3}}, {"val/loss": 1.1}, value=1.1)
    collect = write_run(outputs, "collect", "cc33cc33cc", {"seed": 0}, {"pairs": 900}, [("policy", sft)])
    reward = write_run(
        outputs, "reward_model", "bb22bb22bb", {"seed": 0, "objective": {"_target_": "x.Pairwise", "margin": "small"}},
        {"val/accuracy": 0.81}, [("policy", sft), ("comparisons", collect)], value=0.81,
    )  # fmt: skip
    sweep = outputs / "sweeps" / "2026-01-01-ppo"
    for i, (beta, seed) in enumerate((b, s) for b in betas for s in seeds):
        random.seed(100 * i + seed)
        top, far = 0.55 + 0.35 / (1 + (3 * beta) ** 1.2) - 0.25 * math.exp(-60 * beta), 22 / (1 + 14 * beta)
        folder = write_run(
            outputs, "ppo", f"{i:02d}dd44dd44",
            {"seed": seed, "outputs": str(outputs), "objective": {"_target_": "x.PPO", "beta": beta, "clip": 0.2},
             "model": {"path": str(sft / "model")}},
            {}, [("policy", sft), ("reward_model", reward)], headline="val/gold",
        )  # fmt: skip
        file = MetricsFile(folder / "metrics.csv")
        shift = random.gauss(0, 0.012)
        for step in range(steps):
            grown = 1 - math.exp(-step / (steps / 4))
            row = {
                "score": 3 * (top * grown + shift) + random.gauss(0, 0.12),
                "gold": 0.5 + (top - 0.5) * grown + shift + random.gauss(0, 0.02),
                "kl": far * grown * (1 + random.gauss(0, 0.08)),
                "entropy": 2.0 - 0.6 * grown + random.gauss(0, 0.03),
                "loss": 0.4 * math.exp(-step / 20) + random.gauss(0, 0.02),
            }
            if step % 10 == 9:
                row["val/gold"] = 0.5 + (top - 0.5) * grown + shift
            file.write(step, row)
        summary = json.loads((folder / "summary.json").read_text())
        summary["metrics"] = {k: v for k, v in row.items()}
        summary["value"] = row["val/gold"]
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "samples.jsonl").write_text(
            json.dumps({"prompt": "What colour is the lamp?", "response": f"It is red ({beta}).", "gold": 0.7}) + "\n"
        )
        job = sweep / f"{i:03d}_abcdef"
        job.mkdir(parents=True)
        (job / "run").symlink_to(folder)
    (sweep / "results.csv").write_text(
        "job,objective.beta,status,value,seconds,run,error\n"
        "012_abcdef,9.0,failed,,3.0,,the loss became nan at batch 3\n"
    )
    return sweep
