"""Preloaded last into the process that commands are forked from: what it has imported is never collected again.

A collection would read, and so copy, all of the memory that a command shares with it. Nor do commands say that the
newest releases, with which `make test-newest` tries them, are not tested.
"""

import gc

from rlhf import pipeline

pipeline.untested = lambda: None
gc.collect()
gc.freeze()
