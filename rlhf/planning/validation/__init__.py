"""Validation of one step's config against the constructors that will read it, before anything is loaded."""
