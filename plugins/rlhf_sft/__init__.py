"""Stage plugin of supervised fine-tuning."""
