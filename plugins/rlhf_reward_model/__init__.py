"""Reward model trained on comparisons."""
