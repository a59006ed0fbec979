"""Benchmarks of the stages against peer libraries: ``python -m benchmarks``."""
