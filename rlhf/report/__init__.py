"""Reports that compare runs: tables, plots and pages."""
