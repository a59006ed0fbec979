"""Comparing runs: tables, plots and pages."""
