"""The embedded testbed: no network, no download, and a gold labeller that knows the truth."""

from rlhf.data.testbed.gold import Score, gold
from rlhf.data.testbed.world import Testbed, label

__all__ = ["Score", "Testbed", "gold", "label"]
