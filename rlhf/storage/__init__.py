"""Files: atomic writes, locks, caches, the hub, and the file formats of a run."""
