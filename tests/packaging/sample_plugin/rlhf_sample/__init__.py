"""Objective and reward of a third party."""
