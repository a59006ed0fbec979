"""Running: from a plan to finished runs."""
