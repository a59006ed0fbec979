"""Stage plugin of pretraining."""
