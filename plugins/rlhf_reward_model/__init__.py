"""Stage plugin of a reward model trained on comparisons."""
