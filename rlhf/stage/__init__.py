"""Base classes of stages."""
