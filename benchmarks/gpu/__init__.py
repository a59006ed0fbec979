"""Checks of the framework on one GPU: ``benchmarks/gpu.sh``."""
