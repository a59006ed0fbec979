"""Stage plugin."""
