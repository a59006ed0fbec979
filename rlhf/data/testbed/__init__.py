"""Embedded testbed: no network, no download, and a gold labeller that knows the true score."""

from rlhf.data.testbed.gold import Score, gold
from rlhf.data.testbed.world import Testbed, label_responses

__all__ = ["Score", "Testbed", "gold", "label_responses"]
