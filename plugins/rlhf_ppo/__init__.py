"""Proximal policy optimisation of a language model against a reward."""
