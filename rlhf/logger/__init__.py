"""Loggers of the config group `logger`."""
