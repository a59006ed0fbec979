"""Preloaded last into the process that commands are forked from: what it has imported is never collected again.

A collection would read, and so copy, all of the memory that a command shares with it.
"""

import gc

gc.collect()
gc.freeze()
