"""What `rlhf inspect` shows: data, batches, templates, and what a run will need. Nothing here trains."""
