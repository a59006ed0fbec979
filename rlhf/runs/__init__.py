"""Run directories: their files, their fingerprints, and references to them."""
