"""Direct preference optimization (DPO) and related losses."""
