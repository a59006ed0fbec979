"""Inspection pages of `rlhf inspect`: data, batches, templates, and the amounts and memory of a run. Trains nothing."""
