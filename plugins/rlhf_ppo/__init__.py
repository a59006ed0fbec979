"""Proximal policy optimization of a language model against a reward."""
