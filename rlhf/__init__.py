"""Experiments in reinforcement learning from human feedback: stages, pipelines and sweeps under one Hydra config."""

__version__ = "0.1.0"
