"""Module preloaded last into the process that commands are forked from: exempts its imports from collection.

A garbage collection would read, and so copy, all of the memory that a command shares with it. Commands also do not
warn that the newest releases, with which `make test-newest` runs them, are untested, and leave their figures empty,
because drawing takes a quarter of a tiny pipeline's time; commands in a fresh interpreter draw them.
"""

import gc
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from transformers import conversion_mapping

from rlhf.running import pipeline

pipeline.untested = lambda: None
FigureCanvasAgg.print_png = lambda _, path, **__: Path(path).write_bytes(b"")
conversion_mapping.get_checkpoint_conversion_mapping("llama")  # compiles a thousand regular expressions
gc.collect()
gc.freeze()
