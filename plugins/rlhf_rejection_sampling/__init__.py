"""Stage plugin of rejection sampling fine-tuning."""
