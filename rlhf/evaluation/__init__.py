"""Measurement and comparison of policies."""
