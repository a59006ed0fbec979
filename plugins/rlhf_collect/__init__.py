"""Stage plugin that collects comparisons."""
