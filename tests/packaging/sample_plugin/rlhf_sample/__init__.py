"""A third party's objective and reward."""
