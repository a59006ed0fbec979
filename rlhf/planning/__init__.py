"""Planning: from a typed command to a validated plan of steps."""
